"""Evaluation and then inference of a run folder, in every process of a run: `python -m evaluation_programs MODEL_DIR FOLDER`."""

from t5x_ssm import config, eval, infer


def main(argv):
    """`t5x_ssm.eval` of the run's own data and `t5x_ssm.infer` of the embedded books; their files go below FOLDER."""
    model_dir, folder = argv
    eval.main([f"--model_dir={model_dir}", f"--output_dir={folder}/eval", "--lengths=32"])
    given = [f"--model_dir={model_dir}", f"--output_dir={folder}/infer", "--task=embedded_books", "--batch_size=2"]
    # Five examples are three batches: one process has two of them.
    given += ["--num_examples=5", "--targets_length=40"]
    infer.main([*given, "--mode=score"])
    return infer.main([*given, "--mode=predict", "--prompt_length=8", "--max_new_tokens=8", "--temperature=1.0"])


if __name__ == "__main__":
    config.run_main(main)
