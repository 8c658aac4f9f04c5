"""What lm-evaluation-harness makes of a folder, with mrp_lens out of reach. `analysis.shipping` runs it by its path."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Score the folder on the task; write accuracy and answers."""
    sys.modules["mrp_lens"] = None  # type: ignore[assignment]
    os.environ["HF_MODULES_CACHE"] = str(Path(job["tasks"]) / "modules")
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": job["folder"],
            "trust_remote_code": job["trust_remote_code"],
            "dtype": "float32",
            "add_bos_token": False,  # the task's prompts hold it where it belongs
        },
        tasks=[job["task"]],
        task_manager=TaskManager(include_path=job["tasks"], include_defaults=False),
        batch_size=8,
        device="cuda" if torch.cuda.is_available() else "cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"][job["task"]], key=lambda sample: sample["doc_id"])
    answers = []
    for sample in samples:
        likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
        answers.append(likelihoods.index(max(likelihoods)))
    accuracy = results["results"][job["task"]]["acc,none"]
    Path(job["result"]).write_text(json.dumps({"accuracy": accuracy, "answers": answers}), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
