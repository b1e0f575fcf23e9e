"""The operations as torch custom ops: a folder each, with schema and public functions in its `__init__`."""

from imgopt_fast import _native

_native.load_torch_ops()
