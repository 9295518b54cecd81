"""What asks for the memory of a tensor's numbers, where there is none."""

from typing import Any

from rtn_tensor.tensor.errors import named_error


class WithoutMemory:
    """A base of a tensor that holds no plain numbers: who asks for the memory of a tensor of its shape and
    dtype would read past that of its planes."""

    def _without_memory(self: Any, name: str) -> Exception:
        return named_error(
            self,
            f"{name} gives the memory of plain numbers, and a quantized tensor has none; use "
            ".dequantize() first",
            NotImplementedError,
        )

    def __dlpack__(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise self._without_memory("DLPack")

    def __dlpack_device__(self: Any) -> Any:
        raise self._without_memory("DLPack")

    def __array__(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise self._without_memory("a NumPy array")

    def tolist(self: Any) -> Any:
        raise self._without_memory("tolist()")

    @property
    def __cuda_array_interface__(self: Any) -> Any:
        raise named_error(
            self,
            "a quantized tensor has no __cuda_array_interface__; use .dequantize() first",
            AttributeError,
        )

    def storage(self: Any) -> Any:
        # safetensors asks it; NotImplementedError would mean a tensor without numbers to it, and it would
        # read on.
        what = "a quantized weight lies in two planes, and has no storage of its own"
        way_out = (
            "to save it, use rtn_tensor.save(model, folder) or torch.save, or safe_serialization=False where "
            "the library that saves takes that; its memory is that of .qdata and .scale"
        )
        raise named_error(self, f"{what}; {way_out}", TypeError)
