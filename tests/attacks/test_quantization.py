"""Rounding weights: against loops, against the checkpoint rounded by hand, and the same on both classes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrp_lens.attacks.quantization import block_matrices, quantized, quantized_to_nf4, round_channels
from mrp_lens.models import LensModel, available_backends, load_model, mlp_out_weight
from tests.conftest import assert_same_state, state_of
from tests.support.edits import logits, weight_edit
from tests.support.families import MIXTURES, save_family

NF4 = """-1.0 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734 -0.0910500 0.0
    0.0795803 0.1609302 0.2461123 0.3379152 0.4407098 0.5626170 0.7229568 1.0"""


def rounded_by_hand(matrix: torch.Tensor, bits: int, *, rows_are_outputs: bool) -> torch.Tensor:
    """Entry by entry in Python's own floats."""
    largest = 2 ** (bits - 1) - 1
    result = matrix.clone().double()
    channels = result if rows_are_outputs else result.T
    for channel in channels:
        scale = max(abs(float(value)) for value in channel) / largest
        for place, value in enumerate(channel.tolist()):
            channel[place] = scale * round(value / scale) if scale else 0.0
    return result


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_channel_is_rounded_as_by_hand(bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    matrix = torch.randn(5, 7, generator=generator).to(dtype)
    matrix[2] = 0.0
    by_rows = rounded_by_hand(matrix.float(), bits, rows_are_outputs=True)
    torch.testing.assert_close(round_channels(matrix, (1,), bits).double(), by_rows, atol=1e-6, rtol=0)
    by_columns = rounded_by_hand(matrix.float(), bits, rows_are_outputs=False)
    torch.testing.assert_close(round_channels(matrix, (0,), bits).double(), by_columns, atol=1e-6, rtol=0)
    heads = matrix[:4].reshape(2, 2, 7)  # as W_O: [heads, d_head, d_model]
    flat = rounded_by_hand(matrix[:4].float(), bits, rows_are_outputs=False)
    torch.testing.assert_close(round_channels(heads, (0, 1), bits).double(), flat.reshape(2, 2, 7), atol=1e-6, rtol=0)


def checkpoint_rounded_by_hand(folder: Path, bits: int, tokens: torch.Tensor) -> torch.Tensor:
    """Hugging Face's own model of the folder, the matrices of its blocks rounded, on the tokens."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part.isdigit() for part in name.split(".")) and parameter.ndim > 1:
                is_conv = "c_" in name  # GPT-2's
                for matrix in parameter if parameter.ndim > 2 else [parameter]:  # of each expert, or the only one
                    matrix.copy_(rounded_by_hand(matrix, bits, rows_are_outputs=not is_conv).float())
        output: torch.Tensor = model(tokens).logits
    return output


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "phi3"])
def test_every_class_rounds_what_the_checkpoint_rounded_by_hand_has(family: str, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path)
    for backend in available_backends():
        model = load_model(str(folder), backend=backend)
        tokens = torch.randint(3, model.cfg.d_vocab, (3, 7), generator=torch.Generator().manual_seed(1))
        plain = logits(model, tokens)
        for bits in (4, 8):
            wanted = checkpoint_rounded_by_hand(folder, bits, tokens)
            with quantized(model, bits):
                torch.testing.assert_close(logits(model, tokens), wanted, atol=1e-4, rtol=0)
            assert float((wanted - plain).abs().max()) > 1e-3, "the rounding would not be seen"
        torch.testing.assert_close(logits(model, tokens), plain, atol=0, rtol=0)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_and_their_router_are_rounded_channel_by_channel(family: str, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path)
    model = load_model(str(folder), backend="bridge")
    tokens = torch.randint(3, model.cfg.d_vocab, (3, 7), generator=torch.Generator().manual_seed(1))
    wanted = checkpoint_rounded_by_hand(folder, 8, tokens)
    with quantized(model, 8):
        torch.testing.assert_close(logits(model, tokens), wanted, atol=1e-4, rtol=0)
    with quantized_to_nf4(model):
        assert float((wanted - logits(model, tokens)).abs().max()) > 1e-3


def nf4_by_hand(channels: torch.Tensor) -> torch.Tensor:
    """The nearest of 16 quantiles of a Gaussian, in units of the largest of 64 numbers: QLoRA, arXiv 2305.14314, Eq. 4, appendix E."""
    levels = torch.tensor([float(level) for level in NF4.split()])
    result = channels.detach().clone().reshape(-1)
    for block in result.split(64):
        scale = float(block.abs().max())
        for place, value in enumerate(block.tolist()):
            block[place] = scale * levels[(levels - value / scale).abs().argmin()]
    return result.reshape(channels.shape)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nf4_is_that_of_the_checkpoint_by_hand_on_every_class(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    import transformers

    folder = save_family(family, tmp_path)
    by_hand: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, matrix in by_hand.named_parameters():
            if any(part.isdigit() for part in name.split(".")) and matrix.ndim == 2:
                matrix.copy_(nf4_by_hand(matrix.T).T if "c_" in name else nf4_by_hand(matrix))  # GPT-2's [in, out]
        tokens = torch.randint(3, by_hand.config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(1))
        wanted = by_hand(tokens).logits
    for backend in available_backends():
        model = load_model(str(folder), backend=backend)
        plain = logits(model, tokens)
        with quantized_to_nf4(model):
            torch.testing.assert_close(logits(model, tokens), wanted, atol=1e-4, rtol=0)
        assert float((wanted - plain).abs().max()) > 1e-3, "the rounding would not be seen"
        torch.testing.assert_close(logits(model, tokens), plain, atol=0, rtol=0)


def test_embeddings_norms_and_biases_stay_and_every_matrix_of_the_blocks_is_rounded(
    model: LensModel, untouched: None
) -> None:
    matrices = {id(parameter) for parameter, _ in block_matrices(model)}
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with quantized(model, 4):
        for name, tensor in model.named_parameters():
            assert torch.equal(tensor, before[name]) == (id(tensor) not in matrices), name
    assert len(matrices) == 7 * model.cfg.n_layers  # q, k, v, o, gate, in, out


def test_what_an_edit_wrote_is_rounded_too_and_both_come_off_bit_for_bit(model: LensModel, untouched: None) -> None:
    weight = mlp_out_weight(model, 1)
    original = weight.read()
    with weight_edit(model, 1, scale=3.0).applied(model):
        with quantized(model, 4):
            wanted = rounded_by_hand(3.0 * original, 4, rows_are_outputs=True).float()
            torch.testing.assert_close(weight.read(), wanted, atol=1e-5, rtol=0)
        assert torch.equal(weight.read(), 3.0 * original)
    assert torch.equal(weight.read(), original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["inside", "half way through the rounding"])
def test_the_weights_come_back_bit_for_bit_after_an_exception(
    tiny_folder: Path, backend: str, dtype: torch.dtype, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_folder), backend=backend, dtype=dtype)
    before, calls = state_of(model), []

    def failing(weights: torch.Tensor, inputs: tuple[int, ...], bits: int) -> torch.Tensor:
        calls.append(inputs)
        if len(calls) == 4 and place != "inside":
            raise KeyboardInterrupt
        return round_channels(weights, inputs, bits)

    monkeypatch.setattr("mrp_lens.attacks.quantization.round_channels", failing)
    with pytest.raises(KeyboardInterrupt), quantized(model, 3):
        raise KeyboardInterrupt
    assert (len(calls) == 4) == (place != "inside")
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("bits", [1, 0, -4, True, 4.0, "4"])
def test_bits_that_make_no_sense_are_refused(model: LensModel, untouched: None, bits: Any) -> None:
    with pytest.raises(ValueError, match="bits must be an int of at least 2"), quantized(model, bits):
        pass


def test_a_matrix_of_unknown_layout_is_refused_and_named() -> None:
    expert = torch.nn.Module()
    expert.register_parameter("gate_up_proj", torch.nn.Parameter(torch.ones(2, 3, 4)))
    block = torch.nn.ModuleDict({"experts": expert})
    with (
        pytest.raises(ValueError, match=r"experts\.gate_up_proj of a Module"),
        quantized(SimpleNamespace(blocks=[block]), 4),
    ):
        pass
