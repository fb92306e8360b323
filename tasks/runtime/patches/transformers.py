"""Patches to transformers, written for 5.0.0rc1: loading a torchao checkpoint takes time in proportion to its size."""

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantize_gemma.tasks.runtime.patches import replaced, written_for

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def own_metadata() -> Iterator[None]:
    """Assemble each quantized weight with only its own metadata.

    transformers calls torchao for one weight at a time, but with the metadata of all weights, which torchao searches
    for every weight that the tensors may belong to: this is cubic in the number of weights. The tensors of a call
    belong to a single weight, so its metadata is enough.

    Unnecessary once transformers' `TorchAoDeserialize.convert` passes on only the metadata of the weight at hand.
    """
    from torchao.prototype.safetensors import safetensors_support
    from transformers.integrations import torchao

    stock = safetensors_support.unflatten_tensor_state_dict
    written_for(stock, "0f9620cf89e8c76b")
    written_for(torchao.TorchAoDeserialize, "539a3d244cc09a99")

    def unflatten(tensors: dict[str, "Tensor"], metadata: dict[str, str]) -> object:
        modules = {name.rsplit(".", 1)[0] for name in tensors}
        weight_metadata = {name: value for name, value in metadata.items() if name.rsplit(".", 1)[0] in modules}
        return stock(tensors, {**weight_metadata, "tensor_names": json.dumps(list(weight_metadata))})

    with replaced(torchao, "unflatten_tensor_state_dict", unflatten):
        yield


@contextlib.contextmanager
def shared_quantizer() -> Iterator[None]:
    """Let the converters of a checkpoint's weights share their quantizer.

    transformers makes a deep copy of a converter for each weight, and with it of the quantizer, which has the metadata
    of all weights: this is quadratic in the number of weights. A conversion only reads the quantizer.

    Unnecessary once transformers' `convert_and_load_state_dict_in_model` does not copy the quantizer.
    """
    from transformers import core_model_loading
    from transformers.integrations.torchao import TorchAoDeserialize

    written_for(core_model_loading.convert_and_load_state_dict_in_model, "9c66a82c4c3b5503")
    written_for(TorchAoDeserialize, "539a3d244cc09a99")

    def copy(self: TorchAoDeserialize, _memo: object) -> TorchAoDeserialize:
        return TorchAoDeserialize(self.hf_quantizer)

    with replaced(TorchAoDeserialize, "__deepcopy__", copy):
        yield
