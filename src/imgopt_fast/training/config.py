"""Everything that decides a training, in one place: the function's argument, the file config.yaml, the command line.

Each field's metadata is its help text and its command-line flags, with timm's names where timm has one, so that the
three cannot drift apart.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import yaml

if TYPE_CHECKING:
    import torch

DISTILL_EPOCHS = 3


def option(default: Any, help: str, *flags: str, choices: tuple[str, ...] = ()) -> Any:
    """A field of TrainConfig; without `flags` its name is its flag."""
    return dataclasses.field(default=default, metadata={"help": help, "flags": flags, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """A training; see the help text of each field. Raises ValueError, naming the field, for a value out of range."""

    data: str | None = option(
        None,
        "class folder of images, a zip or tar of one, CIFAR or IDX files, .npz, or WebDataset shards; "
        "default: the embedded Fashion-MNIST subset",
        "--data",
        "--data-dir",
    )
    img_size: int | None = option(None, "side of the square images that a folder gives; default: their own, or 64")
    source_size: int | None = option(
        None, "side at which training images are kept for --crop-scale to draw from; default: --img-size"
    )
    validation: float = option(0.1, "share of the training images that is held out where there is no validation split")

    model: str = option(
        "",
        "network: resnet8, resnet20, resnet18, resnet50, mobilenetv2, vit, timm/NAME, or a function of your own as "
        "package.module:function or file.py:function, called with num_classes=N and in_channels=N; default: that of "
        "the run of --pretrained, else resnet8",
    )
    pretrained: str | None = option(None, "run folder or weight file of the same network to begin with")
    transfer: str = option(
        "finetune",
        "what learns of a pretrained network: all of it; the last layer behind a frozen body; the last layer on "
        "features computed once, in seconds",
        choices=("finetune", "frozen", "features"),
    )
    unfreeze: int | None = option(
        None, "epochs of frozen or features after which the body learns, too, without batch norm's statistics"
    )
    epochs: int = option(20, "epochs of dense training; 0 takes the network of --pretrained as it is")
    batch_size: int = option(
        0,
        "images per step; 0: 128, on a GPU 512, or what leaves few images 32 steps an epoch and fits the memory",
        "-b",
        "--batch-size",
    )
    lr: float = option(
        0.0, "highest learning rate; 0: 0.2 for a batch of 128 and in proportion, 0.002 and its root for adam and adamw"
    )
    grad_accum_steps: int = option(1, "batches whose gradients make one update")
    opt: str = option(
        "sgd",
        "optimizer; gd is gradient descent: one update per epoch from the exact gradient of the whole training set",
        choices=("sgd", "adam", "adamw", "gd"),
    )
    momentum: float = option(0.9, "momentum of SGD (Nesterov's)")
    weight_decay: float = option(5e-4, "weight decay of the convolution and linear weights")
    layer_decay: float = option(1.0, "learning rate of each block, as a share of that of the block above")
    sched: str = option("cosine", "learning rate after the warm-up", choices=("cosine", "linear", "step"))
    decay_epochs: float = option(30.0, "epochs between the steps of --sched step")
    decay_rate: float = option(0.1, "factor of each step of --sched step")
    warmup_epochs: float = option(
        2.0, "epochs over which the learning rate rises to --lr; a quarter of the stage's epochs at most"
    )
    smoothing: float = option(0.1, "label smoothing")
    clip_grad: float | None = option(
        None, "largest norm of the gradient; default: as it comes, in int8-aware training 1"
    )
    l1: float = option(0.0, "strength of the L1 norm, whose proximal step makes weights exactly zero")
    grad_sampling: int = option(1, "take the weights' gradients from one of N parts of each batch (unbiased); 1: all")
    model_ema_decay: float = option(0.0, "decay of a moving average of the weights, which then is the result; 0: none")

    crop_scale: tuple[float, float] | None = option(
        None, "cut a random part of this share of the area out of each image, lowest and highest; default: none"
    )
    crop_ratio: tuple[float, float] = option((0.75, 1.3333333333333333), "width over height of these parts")
    hflip: float = option(0.5, "probability of a horizontal flip")
    degrees: float = option(10.0, "random rotation, in degrees either way")
    translate: float = option(0.1, "random shift, as a share of the image's size")
    scale: tuple[float, float] = option((0.9, 1.1), "random zoom, lowest and highest")

    aa: str = option("none", "policy of random operations on top", choices=("none", "rand", "trivial"))
    reprob: float = option(0.0, "probability of erasing a random rectangle")
    mixup: float = option(0.0, "alpha of mixing an image with the one before it; 0 mixes none")
    cutmix: float = option(0.0, "alpha of pasting a rectangle of the image before; 0 pastes none")

    sparsity: float = option(0.8, "share of the weights that pruning removes; 0 skips pruning")
    prune_epochs: int = option(6, "epochs of gradual pruning and recovery")
    prune_lr: float = option(0.0, "highest learning rate while pruning; 0: half of --lr")
    prune_warmup_epochs: float = option(0.5, "the same to --prune-lr")
    distill: str | None = option(None, "run folder of a teacher; without one, pruning learns from the dense network")
    distill_loss_weight: float = option(0.5, "share of the loss that is the teacher's; 0 learns from the labels alone")
    kd_temperature: float = option(4.0, "temperature of the distillation")
    kd_hint_weight: float = option(0.0, "weight of the distance to the teacher's pooled features")
    kd_cache: bool = option(False, "ask the teacher once for each image without augmentation, and never again")
    distill_epochs: int | None = option(
        None, "epochs under the teacher after pruning, with the mask that it left; default: 3 with --distill, else 0"
    )

    quantize: str = option(
        "int8",
        "quantization at the end; pow2: int8 with power-of-two scales, in integers and shifts alone, as hardware wants",
        choices=("int8", "pow2", "none"),
    )
    qat_epochs: int = option(1, "epochs of quantization-aware training before the quantization")
    qat_lr: float = option(0.0, "highest learning rate of the quantization-aware training; 0: a fortieth of --lr")
    calibration: int = option(512, "training images that the quantization's ranges are measured on")

    seed: int = option(0, "seed of the initial weights, the order of the images and every random draw")
    amp: bool | None = option(None, "mixed precision; default: where the processor has instructions for bfloat16")
    amp_dtype: str = option("bfloat16", "of mixed precision; float16 scales the loss", choices=("bfloat16", "float16"))
    channels_last: bool = option(True, "NHWC memory")
    torchcompile: str | None = option(None, "torch.compile backend (inductor) for training; default: none")
    cuda_graphs: bool = option(True, "record the step of a GPU's training once and replay it, where that is possible")
    device: str = option("cpu", "torch device; under torchrun `cuda` is each process' own")

    output: str = option("runs", "folder that holds the run folders")
    experiment: str | None = option(None, "name of the run folder; default: model, data and date")
    reference_epoch: bool = option(True, "time one epoch of a plain PyTorch loop too")
    memory: bool = option(True, "measure the memory of each stage's network, in a process of its own")

    def __post_init__(self) -> None:
        at_least = {
            "epochs": int(self.pretrained is None),
            "batch_size": 0,
            "prune_epochs": 0,
            "calibration": 1,
            "seed": 0,
        }
        at_least |= {"qat_epochs": 0, "grad_accum_steps": 1, "grad_sampling": 1}
        for name, low in at_least.items():
            _expect(getattr(self, name) >= low, name, f"at least {low}", getattr(self, name))
        for name in ("kd_temperature", "decay_epochs", "decay_rate"):
            _expect(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        for name in ("momentum", "smoothing", "sparsity", "model_ema_decay"):
            _expect(0 <= getattr(self, name) < 1, name, "a number in [0, 1)", getattr(self, name))
        rates = ("lr", "prune_lr", "qat_lr", "weight_decay", "l1", "kd_hint_weight")
        for name in (*rates, "warmup_epochs", "prune_warmup_epochs", "degrees", "translate", "mixup", "cutmix"):
            _expect(getattr(self, name) >= 0, name, "a number that is not negative", getattr(self, name))
        for name in ("hflip", "reprob"):
            _expect(0 <= getattr(self, name) <= 1, name, "a probability", getattr(self, name))
        _expect(self.clip_grad is None or self.clip_grad > 0, "clip_grad", "a positive number", self.clip_grad)
        _expect(0 < self.layer_decay <= 1, "layer_decay", "a share", self.layer_decay)
        _expect(
            self.distill_epochs is None or self.distill_epochs >= 0, "distill_epochs", "at least 0", self.distill_epochs
        )
        _expect(
            not (self.kd_cache and (self.mixup or self.cutmix)), "kd_cache", "no --mixup and no --cutmix with it", True
        )
        _expect(
            self.transfer == "finetune" or self.pretrained is not None,
            "transfer",
            "--pretrained with it",
            self.transfer,
        )
        if self.unfreeze is not None and self.epochs > 0:
            _expect(self.transfer != "finetune", "unfreeze", "--transfer frozen or features with it", self.unfreeze)
            _expect(0 < self.unfreeze < self.epochs, "unfreeze", "some of the --epochs", self.unfreeze)
        _expect(0 <= self.distill_loss_weight <= 1, "distill_loss_weight", "a share", self.distill_loss_weight)
        _expect(0 < self.validation < 0.5, "validation", "a share between 0 and 0.5", self.validation)
        _expect(self.img_size is None or self.img_size >= 8, "img_size", "at least 8", self.img_size)
        for name in ("scale", "crop_scale", "crop_ratio"):
            interval = getattr(self, name) or (1.0, 1.0)
            _expect(0 < interval[0] <= interval[1], name, "two positive numbers, the lower one first", interval)
        _expect(self.crop_scale is None or self.crop_scale[1] <= 1, "crop_scale", "at most 1", self.crop_scale)
        if self.source_size is not None:
            given = self.img_size is not None and self.crop_scale is not None
            _expect(given, "source_size", "--img-size and --crop-scale with it", self.source_size)
            _expect(self.source_size >= (self.img_size or 0), "source_size", "at least --img-size", self.source_size)
        for field in dataclasses.fields(self):
            if choices := field.metadata["choices"]:
                _expect(
                    getattr(self, field.name) in choices, field.name, " or ".join(choices), getattr(self, field.name)
                )
        experiment = self.experiment
        _expect(
            experiment is None or Path(experiment).name == experiment, "experiment", "a plain folder name", experiment
        )

    def model_title(self) -> str:
        """The network's name, of a file without its folder."""
        return self.model.rpartition("/")[2]

    def uses_amp(self) -> bool:
        """Whether to train in bfloat16: as wished, or where it is an instruction and not an emulation."""
        if self.amp is not None:
            return self.amp
        import torch  # two seconds that `--help` need not wait

        if self.device.startswith("cuda"):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        features = cpu_features()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))

    def amp_type(self) -> "torch.dtype":
        import torch

        return torch.float16 if self.amp_dtype == "float16" else torch.bfloat16

    def distilled_epochs(self) -> int:
        """Epochs of the stage between pruning and quantization-aware training."""
        if self.distill_epochs is not None:
            return self.distill_epochs
        return DISTILL_EPOCHS if self.distill is not None and self.sparsity > 0 and self.prune_epochs > 0 else 0

    def save(self, path: Path) -> None:
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> "TrainConfig":
        """The configuration in a YAML file; a name that is no field, or a value of a wrong type, is a ValueError."""
        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected names and values, got {type(values).__name__}")
        types = get_type_hints(cls)
        for name, value in values.items():
            if name not in types:
                raise ValueError(f"{path}: there is no option {name!r}")
            values[name] = _typed(f"{path}: {name}", types[name], value)
        return cls(**values)


def cpu_features() -> dict[str, Any]:
    """What torch says about the processor; empty for a torch that does not say it."""
    import torch

    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return features


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _typed(what: str, wanted: Any, value: Any) -> Any:
    """`value` as the type `wanted`; YAML has no tuples, and writes 2.0 as it likes."""
    if isinstance(wanted, UnionType):
        return None if value is None else _typed(what, get_args(wanted)[0], value)
    if get_origin(wanted) is tuple:
        members = get_args(wanted)
        if not isinstance(value, list) or len(value) != len(members):
            raise ValueError(f"{what}: expected a list of {len(members)}, got {value!r}")
        return tuple(_typed(what, m, v) for m, v in zip(members, value, strict=True))
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{what}: expected {wanted.__name__}, got {value!r}")
    return value
