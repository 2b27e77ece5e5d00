"""Benchmarks of EleutherAI's lm-evaluation-harness with a checkpoint.

    python -m t5x_ssm.harness --model_dir=RUN_FOLDER --tasks=lambada_openai,hellaswag [--num_fewshot=3] [--limit=100]
    python -m t5x_ssm.harness --model_dir=RUN_FOLDER --tasks=mine --include_path=FOLDER_WITH_YAML

Needs the extra `eval`. Prints the harness's table and writes its results to MODEL_DIR/evaluation/harness.json. Tasks that the
harness does not have are described in its own YAML format; it downloads the data of its own ones from the Hugging Face Hub.
"""

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

import gin

from t5x_ssm import config as config_lib
from t5x_ssm.errors import UserError
from t5x_ssm.generate import Writer
from t5x_ssm.integrations.lm_eval import Requests, harness_model
from t5x_ssm.training import places


def requests_of(writer: Writer, batch_size: int) -> Requests:
    """Answers to the harness from a restored model and its vocabulary."""
    codec = writer.codec

    def decode(ids: list[int]) -> str:
        return codec.decoder()(ids)

    return Requests(
        writer.generator, codec.encode, decode, eos_id=codec.eos_id, vocab_size=codec.size, batch_size=batch_size
    )


def evaluate(requests: Requests, tasks: Sequence[str], include_path: str | None, **settings: Any) -> dict[str, Any]:
    """The harness's results of some tasks.

    Args:
      requests: the model.
      tasks: names of tasks or groups.
      include_path: a folder with more tasks in the harness's format.
      **settings: `num_fewshot` and `limit` of `lm_eval.simple_evaluate`.

    Raises:
      UserError: the harness is not installed, or a task is not known.
    """
    model = harness_model(requests)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = sorted(set(tasks) - set(manager.match_tasks(list(tasks))))
    if unknown:
        raise UserError(f"--tasks: the harness knows no {', '.join(unknown)}; --include_path=FOLDER adds tasks.")
    return lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **settings)


def main(argv: Sequence[str]) -> int:
    """Configures the model from the command line and evaluates it."""
    parser = argparse.ArgumentParser(prog="python -m t5x_ssm.harness", description=__doc__.split("\n")[0])
    parser.add_argument("--model_dir", help="a run folder: its configuration and newest checkpoint")
    parser.add_argument("--tasks", required=True, help="names of the harness, separated by commas")
    parser.add_argument("--include_path", help="a folder with more tasks")
    parser.add_argument(
        "--num_fewshot", type=int, help="examples before each question; the task's own number by default"
    )
    parser.add_argument("--limit", type=int, help="examples of each task")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output_dir", help="where harness.json goes; MODEL_DIR/evaluation by default")
    arguments = config_lib.parse_arguments(argv, parser)
    options = arguments.options
    from t5x_ssm.generate import open_writer as configured

    config_lib.load_run(arguments, "runs/generate.gin")
    config_lib.set_unless_given(CHECKPOINT_PATH=options.model_dir)
    config_lib.check(configured, *config_lib.training_root())
    output = options.output_dir or (options.model_dir and os.path.join(options.model_dir, "evaluation"))
    if not output:
        raise UserError("--output_dir must be set where there is no --model_dir.")
    folder = places.place(output, "--output_dir")
    requests = requests_of(gin.get_configurable(configured)(), options.batch_size)
    settings = {"num_fewshot": options.num_fewshot, "limit": options.limit}
    found = evaluate(requests, options.tasks.split(","), options.include_path, **settings)
    from lm_eval.utils import make_table

    print(make_table(found))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "harness.json"
    path.write_text(json.dumps({"results": found["results"], "versions": found["versions"]}, indent=1) + "\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    config_lib.run_main(main)
