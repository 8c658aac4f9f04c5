"""Models: loading, recognising, and where editable weights live. Only this package knows HookedTransformer from TransformerBridge."""

from mrp_lens.model.base import (
    LensModel,
    architecture_of,
    available_backends,
    check_layers,
    device_of,
    dtype_of,
    forward,
    is_bridge,
    logits_of,
    modules_of,
)
from mrp_lens.model.load import ModelMismatchError, load_model
from mrp_lens.model.trainable import CheckpointTensor, checkpoint_tensors, restored
from mrp_lens.model.weights import (
    EditableWeight,
    check_same_model,
    checkpoint_names,
    describe,
    hf_state,
    hf_weights,
    mlp_out_weight,
    same_tensor,
    tensor_digests,
    weights_by_name,
    why_not_exportable,
)

__all__ = [
    "CheckpointTensor",
    "EditableWeight",
    "LensModel",
    "ModelMismatchError",
    "architecture_of",
    "available_backends",
    "check_layers",
    "check_same_model",
    "checkpoint_names",
    "checkpoint_tensors",
    "describe",
    "device_of",
    "dtype_of",
    "forward",
    "hf_state",
    "hf_weights",
    "is_bridge",
    "load_model",
    "logits_of",
    "mlp_out_weight",
    "modules_of",
    "restored",
    "same_tensor",
    "tensor_digests",
    "weights_by_name",
    "why_not_exportable",
]
