"""Run in a process of its own: what a Hugging Face model computes, loaded as anybody would load it.

`python reload.py JOB.json` reads tokens and writes log-probabilities. It needs torch, transformers and safetensors; mrp_lens
is hidden from it unless an edit is to be attached.
"""

import json
import sys
from pathlib import Path
from typing import Any


def token_ids(tokenizer: Any, texts: list[str]) -> Any:
    """The tokens of all texts in one row, -1 after each."""
    import torch

    return torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], -1]])


def main(job: dict[str, Any]) -> None:
    """Load each of the job's models in turn and write its log-probabilities."""
    if all(model["edit"] is None for model in job["models"]):
        sys.modules["mrp_lens"] = None  # type: ignore[assignment]
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    batch = load_file(job["tokens"])
    device = torch.device(job["device"])
    for wanted in job["models"]:
        trust = wanted["trust_remote_code"]
        hf_model = AutoModelForCausalLM.from_pretrained(
            wanted["folder"], dtype=getattr(torch, job["dtype"]), trust_remote_code=trust
        )
        hf_model.to(device).eval()
        if wanted["edit"] is not None:
            from mrp_lens.hf import attach

            attach(hf_model, wanted["edit"])
        with torch.no_grad():
            output = hf_model(
                input_ids=batch["tokens"].to(device), attention_mask=batch["attention_mask"].to(device), use_cache=False
            )
        result = {"log_probabilities": output.logits.float().log_softmax(-1).cpu()}
        del hf_model, output
        if wanted["tokenizer"]:
            tokenizer = AutoTokenizer.from_pretrained(wanted["folder"], trust_remote_code=trust)
            result["token_ids"] = token_ids(tokenizer, job["texts"])
        save_file(result, wanted["result"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
