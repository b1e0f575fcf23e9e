"""The embedded set, class folders with every defect that a user's folder has, splits, and the order of the batches."""

import gzip
import importlib
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import require
from PIL import Image

from imgopt_fast.data import (
    DataError,
    Split,
    decode,
    decode_whole,
    load_dataset,
    load_labelled,
    stable_fraction,
    upright_size,
)
from imgopt_fast.data.embedded.make_subset import draw
from imgopt_fast.data.idx import read_idx

decoding = importlib.import_module("imgopt_fast.data.decode")  # the package's `decode` is its function


def make_folder(root: Path, *, images: int = 20, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Path:
    """A class folder of noise, brighter in each class than in the one before."""
    rng = np.random.default_rng(0)
    for c in range(2):
        folder = root / f"class{c}"
        folder.mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(40 * c, 40 * c + 40, (size[1], size[0], len(mode)), np.uint8)
            Image.fromarray(pixels.squeeze() if mode == "L" else pixels).save(folder / f"{i}.png")
    return root


def test_embedded_is_balanced_and_its_splits_do_not_overlap() -> None:
    data = load_dataset()
    assert len(data.train) + len(data.validation) == 10_000
    assert len(data.test) == 2_000
    assert (data.train.labels.bincount() + data.validation.labels.bincount()).tolist() == [1000] * 10
    assert data.test.labels.bincount().tolist() == [200] * 10
    assert data.train.images.shape[1:] == (1, 28, 28)
    assert data.train.images.dtype == torch.uint8
    assert 900 < len(data.validation) < 1100
    seen = {image.numpy().tobytes() for image in data.train.images}
    again = sum(image.numpy().tobytes() in seen for image in data.test.images)
    assert again <= 2  # the published files themselves share a few images


def test_embedded_validation_split_does_not_depend_on_anything_else() -> None:
    small, large = load_dataset(validation=0.1), load_dataset(validation=0.2)
    larger = {image.numpy().tobytes() for image in large.validation.images}
    assert all(image.numpy().tobytes() in larger for image in small.validation.images)


def test_statistics_are_the_moments_of_the_training_images() -> None:
    data = load_dataset()
    pixels = data.train.images.double() / 255
    mean, std = data.statistics()
    assert mean[0] == pytest.approx(pixels.mean().item(), rel=1e-9)
    assert std[0] == pytest.approx(pixels.std(correction=0).item(), rel=1e-9)


def test_subset_is_drawn_without_replacement_per_class() -> None:
    labels = np.arange(10).repeat(30).astype(np.uint8)
    np.random.default_rng(1).shuffle(labels)
    chosen = draw(labels, 7, np.random.default_rng(2))
    assert len(set(chosen.tolist())) == 70
    assert np.bincount(labels[chosen]).tolist() == [7] * 10
    assert (np.diff(chosen) > 0).all()


def test_idx_reads_what_was_published_and_refuses_the_rest(tmp_path: Path) -> None:
    body = bytes((0, 0, 8, 2)) + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes(range(6))
    (tmp_path / "plain").write_bytes(body)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(body))
    for name in ("plain", "packed.gz"):
        assert read_idx(tmp_path / name).tolist() == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "short").write_bytes(body[:-1])
    with pytest.raises(ValueError, match=r"short: expected 6 bytes of data for shape \(2, 3\), got 5"):
        read_idx(tmp_path / "short")
    (tmp_path / "other").write_bytes(b"\x89PNG....")
    with pytest.raises(ValueError, match="expected an IDX file"):
        read_idx(tmp_path / "other")


def test_folder_without_splits_is_split_by_path(tmp_path: Path) -> None:
    data = load_dataset(make_folder(tmp_path / "set", images=60))
    assert data.class_names == ("class0", "class1")
    assert len(data.train) + len(data.validation) + len(data.test) == 120
    # Each image is where its own path says: 10 % validation, then 10 % test.
    paths = [f"class{c}/{i}.png" for c in range(2) for i in range(60)]
    assert len(data.validation) == sum(stable_fraction(p) < 0.1 for p in paths)
    assert len(data.test) == sum(0.1 <= stable_fraction(p) < 0.2 for p in paths)
    for split in (data.train, data.validation, data.test):
        brightness = split.images.float().mean(dim=(1, 2, 3))
        assert ((brightness > 40).long() == split.labels).all()


TAKEN = "validation taken from the training images"


@pytest.mark.parametrize(
    ("names", "about"),
    [
        (("train", "val", "test"), ""),
        (("train", "test"), TAKEN),
        (("train", "validation"), f"{TAKEN}, val is the test"),
    ],
)
def test_folder_with_splits_uses_them(tmp_path: Path, names: tuple[str, ...], about: str) -> None:
    """One beside `train` is what the accuracy is published of, and is looked at in the end only."""
    for name in names:
        make_folder(tmp_path / name, images=40 if name == "train" else 3)
    data = load_dataset(tmp_path)
    assert len(data.test) == 6
    assert len(data.validation) == 6 if len(names) == 3 else 0 < len(data.validation) < 20
    assert len(data.train) == 80 - (0 if len(names) == 3 else len(data.validation))
    assert data.splits == about
    assert len(load_labelled(tmp_path, data.class_names, (12, 12), 3)[0]) == 6


def test_folder_images_keep_a_shared_size_or_are_fitted(tmp_path: Path) -> None:
    same = load_dataset(make_folder(tmp_path / "same", images=40, size=(12, 12)))
    assert same.train.images.shape[1:] == (3, 12, 12)
    wide = make_folder(tmp_path / "wide", images=40, size=(40, 20))
    assert load_dataset(wide, image_size=16).train.images.shape[1:] == (3, 16, 16)
    Image.new("RGB", (90, 70)).save(wide / "class0" / "large.jpg")
    assert load_dataset(wide).train.images.shape[1:] == (3, 64, 64)


def test_folder_of_grey_images_has_one_channel(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "grey", images=40, mode="L")
    assert load_dataset(root).channels == 1
    Image.new("RGB", (12, 12)).save(root / "class0" / "colour.png")
    assert load_dataset(root).channels == 3


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    assert np.array_equal(decode(tmp_path / "deep.png", 8, 8, 1)[..., 0], pixels >> 8)


def test_labelled_images_take_the_labels_of_a_known_list(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", images=3)
    (root / "class0" / "damaged.png").touch()
    split, skipped = load_labelled(root, ("class1", "class2", "class0"), (6, 5), 1)
    assert [name for name, _ in skipped] == ["class0/damaged.png"]
    assert split.images.shape == (6, 1, 6, 5)
    assert split.labels.tolist() == [2, 2, 2, 0, 0, 0]
    with pytest.raises(DataError, match="set: the network has no class 'class1', only class0"):
        load_labelled(root, ("class0",), (6, 5), 1)
    with pytest.raises(DataError, match="missing: no such folder or archive"):
        load_labelled(tmp_path / "missing", ("class0",), (6, 5), 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected a folder of images per class, found none"):
        load_labelled(tmp_path / "empty", ("class0",), (6, 5), 1)


@pytest.mark.parametrize("mode", ["P", "CMYK", "RGBA", "LA", "I;16", "1"])
def test_every_mode_becomes_pixels(tmp_path: Path, mode: str) -> None:
    root = make_folder(tmp_path / "set", images=40)
    Image.new(mode, (12, 12)).save(root / "class0" / ("odd.tif" if mode in ("CMYK", "I;16") else "odd.png"))
    assert load_dataset(root).channels == 3


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", images=40, size=(16, 16))
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was held upside down
    names = [f"turned{i}" for i in range(50)]
    name = next(n for n in names if 0.1 <= stable_fraction(f"class0/{n}.png") < 0.2)
    Image.fromarray(upright[::-1]).save(root / "class0" / f"{name}.png", exif=exif)
    test = load_dataset(root).test
    assert any(np.array_equal(image.permute(1, 2, 0).numpy(), upright) for image in test.images)


def damage_text(root: Path) -> None:
    (root / "class1" / "damaged.jpg").write_text("no image")


def damage_truncated(root: Path) -> None:
    Image.effect_noise((64, 64), 50).save(root / "class1" / "damaged.jpg")
    whole = (root / "class1" / "damaged.jpg").read_bytes()
    (root / "class1" / "damaged.jpg").write_bytes(whole[: len(whole) // 2])


def damage_empty(root: Path) -> None:
    (root / "class1" / "damaged.jpg").touch()


def damage_bomb(root: Path) -> None:
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0)
    (root / "class1" / "damaged.jpg").write_bytes(header + struct.pack(">I", zlib.crc32(header[12:])))


DAMAGES = [damage_text, damage_truncated, damage_empty, damage_bomb]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("fast", [True, False])
def test_an_unreadable_image_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], fast: bool
) -> None:
    monkeypatch.setattr(decoding, "simplejpeg", decoding.simplejpeg if fast else None)
    root = make_folder(tmp_path / "set", images=40)
    whole = load_dataset(root, image_size=12)
    damage(root)
    data = load_dataset(root, image_size=12)
    assert [skipped.name for skipped in data.skipped] == ["class1/damaged.jpg"]
    assert data.skipped[0].reason
    for part in ("train", "validation", "test"):
        assert getattr(data, part).images.equal(getattr(whole, part).images)
        assert getattr(data, part).labels.equal(getattr(whole, part).labels)
    with pytest.raises(DataError, match=r"class1/damaged\.jpg: cannot read this image: .+"):
        decode(root / "class1" / "damaged.jpg", 8, 8, 3)


def test_a_folder_of_unreadable_images_says_so(tmp_path: Path) -> None:
    for path in make_folder(tmp_path / "set", images=40).rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(DataError, match=r"set: 80 images cannot be read .* the first is .*png: not an image"):
        load_dataset(tmp_path / "set")


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "moving.gif", 8, 8, 3).reshape(-1, 3).mean(axis=0).tolist() == [255, 0, 0]


def test_both_decoders_see_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(decoding.simplejpeg is not None, "simplejpeg")
    smooth = np.add.outer(np.arange(96), np.arange(128))[..., None] * np.array([1.0, 0.7, 0.3])
    for name, mode in (("colour", "RGB"), ("grey", "L"), ("printed", "CMYK")):
        Image.fromarray(smooth.astype(np.uint8)).convert(mode).save(tmp_path / f"{name}.jpg", quality=95)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "turned.jpg", exif=turned)
    for path in sorted(tmp_path.glob("*.jpg")):
        for height, width, channels in ((96, 128, 3), (24, 24, 3), (40, 20, 1)):
            both = []
            for library in (decoding.simplejpeg, None):
                monkeypatch.setattr(decoding, "simplejpeg", library)
                both.append(decode(path, height, width, channels).astype(int))
                monkeypatch.undo()
            assert np.abs(both[0] - both[1]).max() <= 6, (path.name, height)


@pytest.mark.parametrize("library", ["simplejpeg", "Pillow"])
def test_a_whole_image_is_upright_and_may_reuse_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    if library == "Pillow":
        monkeypatch.setattr(decoding, "simplejpeg", None)
    ramp = np.add.outer(np.arange(30) * 3, np.arange(50) * 3).clip(0, 255).astype(np.uint8)
    plain, turned = Image.fromarray(ramp), Image.Exif()
    turned[0x0112] = 6  # a quarter
    plain.convert("RGB").save(tmp_path / "plain.jpg", quality=95)
    plain.convert("CMYK").save(tmp_path / "printed.jpg", quality=95)
    plain.save(tmp_path / "grey.png")
    plain.convert("RGB").save(tmp_path / "turned.jpg", exif=turned, quality=95)
    plain.save(tmp_path / "turned.png", exif=turned)
    buffer = np.empty(30 * 50 * 3, np.uint8)
    for path in sorted(tmp_path.iterdir()):
        data = path.read_bytes()
        expected = np.rot90(ramp, -1) if "turned" in path.name else ramp
        for memory in (None, buffer, buffer[:-1]):
            pixels = decode_whole(data, memory)
            assert pixels.shape == (*upright_size(data), 3) == (*expected.shape, 3), path.name
            assert np.abs(pixels.astype(int) - expected[..., None]).max() <= 8, path.name
    for damaged in (b"no image", b"\xff\xd8\xff and no more"):
        for function in (decode_whole, upright_size):
            with pytest.raises(decoding.UnreadableError):
                function(damaged)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing: no such folder or archive"):
        load_dataset(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: neither a folder nor a zip or tar archive"):
        load_dataset(tmp_path / "file")
    with pytest.raises(DataError, match="a folder of images per class, two at least; found 0"):
        load_dataset(tmp_path)
    with pytest.raises(DataError, match="too few images, none for the validation split"):
        load_dataset(make_folder(tmp_path / "few", images=1))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"validation: expected a share between 0 and 0\.5, got 0\.7"):
        load_dataset(validation=0.7)
    with pytest.raises(ValueError, match="image_size: the embedded images are 28x28, got 32"):
        load_dataset(image_size=32)


def zip_stored(root: Path, inside: str) -> Path:
    return zip_folder(root, inside, zipfile.ZIP_STORED)


def zip_deflated(root: Path, inside: str) -> Path:
    return zip_folder(root, inside, zipfile.ZIP_DEFLATED)


def zip_folder(root: Path, inside: str, method: int) -> Path:
    with zipfile.ZipFile(root.with_suffix(".zip"), "w", method) as archive:
        archive.writestr("__MACOSX/class0/0.png", b"no image")
        for path in root.rglob("*.png"):
            archive.write(path, inside + path.relative_to(root).as_posix())
    return root.with_suffix(".zip")


def tar_plain(root: Path, inside: str) -> Path:
    return tar_folder(root, inside, "")


def tar_packed(root: Path, inside: str) -> Path:
    return tar_folder(root, inside, "gz")


def tar_folder(root: Path, inside: str, method: str) -> Path:
    with tarfile.open(root.with_suffix(".tar"), f"w:{method}") as archive:
        archive.add(root, inside or ".")
    return root.with_suffix(".tar")


@pytest.mark.parametrize("inside", ["", "photos/"])
@pytest.mark.parametrize("pack", [zip_stored, zip_deflated, tar_plain, tar_packed])
def test_an_archive_is_its_folder(tmp_path: Path, pack: Callable[[Path, str], Path], inside: str) -> None:
    root = make_folder(tmp_path / "set", images=40)
    path = pack(root, inside)
    folder, archived = load_dataset(root), load_dataset(path)
    assert archived.class_names == folder.class_names
    for part in ("train", "validation", "test"):
        ours, theirs = getattr(archived, part), getattr(folder, part)
        assert ours.images.equal(theirs.images)
        assert ours.labels.equal(theirs.labels)
    assert load_labelled(path, folder.class_names, (12, 12), 3)[0].images.shape == (80, 3, 12, 12)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", images=40)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(root.rglob("*.png")):
            archive.write(path, path.relative_to(root).as_posix())
    whole = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "set.zip").write_bytes(whole[:1000] + bytes(100) + whole[1100:])
    assert [skipped.reason[:27] for skipped in load_dataset(tmp_path / "set.zip").skipped] == [
        "the archive is damaged here"
    ]
    (tmp_path / "set.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"set\.zip: a zip archive without its end: cut short, or damaged"):
        load_dataset(tmp_path / "set.zip")
    for pack in (tar_plain, tar_packed):
        path = pack(root, "")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 100])
        with pytest.raises(DataError, match=r"set\.tar: cut short, or damaged: "):
            load_dataset(path)


def test_a_sample_is_spread_over_the_split() -> None:
    split = Split(torch.arange(23, dtype=torch.uint8).view(23, 1, 1, 1), torch.arange(23))
    assert split.sample(5).labels.tolist() == [0, 4, 9, 13, 18]
    assert split.sample(23).labels.equal(split.sample(99).labels)
    assert split.first(5).labels.tolist() == [0, 1, 2, 3, 4]


def test_order_of_the_batches() -> None:
    split = Split(torch.arange(23, dtype=torch.uint8).view(23, 1, 1, 1), torch.arange(23))

    def order(batch_size: int = 5, seed: int = 0, epoch: int = 0, first: int = 0) -> list[list[int]]:
        batches = list(split.shuffled(batch_size, seed=seed, epoch=epoch, first=first))
        for index, batch in batches:
            assert batch.labels.equal(index)
            assert batch.images.flatten().long().equal(index)
        return [index.tolist() for index, _ in batches]

    whole = order()
    assert [len(batch) for batch in whole] == [5, 5, 5, 5]  # the short one is dropped
    assert len({i for batch in whole for i in batch}) == 20
    assert order() == whole
    assert order(first=2) == whole[2:]
    assert order(epoch=1) != whole
    assert order(seed=1) != whole
    assert order(batch_size=10) == [whole[0] + whole[1], whole[2] + whole[3]]
    assert [len(batch) for batch in order(batch_size=64)] == [23]
    assert [len(batch) for batch in split.in_order(10)] == [10, 10, 3]
