"""The demonstration behind `bash launch/quickstart.sh`: train, interrupt, resume, evaluate, plot, write text, compare.

Every step is a command of the project, shown as it is run, so that each can be repeated alone.
"""

import argparse
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys
import time

from launch import compressors

DOMAINS = ("books", "code", "math")
TRAIN_LENGTH = 512
STEPS = 400
INTERRUPT_AT = 0.4  # of all steps
PROMPT = "The value of the expression is"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bash launch/quickstart.sh", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer make it shorter and the model worse")
    parser.add_argument("--model_dir", type=pathlib.Path, default=pathlib.Path("runs/quickstart"), help="run folder")
    arguments = parser.parse_args(argv)
    folder = arguments.model_dir
    started = time.monotonic()
    if arguments.steps < 20:
        parser.error(f"--steps={arguments.steps}: at least 20 are needed to interrupt and resume.")
    settings = ["--gin_file=quickstart.gin", f"--gin.MODEL_DIR={folder}", f"--gin.TRAIN_STEPS={arguments.steps}"]
    if arguments.steps < STEPS:
        settings.append(f"--gin.WARMUP_STEPS={arguments.steps // 10}")

    title("1. Train, and interrupt it on the way")
    train(settings, folder, arguments.steps)
    title("2. Evaluate held-out text at 1, 2 and 4 times the training length")
    lengths = [TRAIN_LENGTH * factor for factor in (1, 2, 4)]
    run(
        "t5x_ssm.eval",
        *model(folder),
        f"--lengths={','.join(map(str, lengths))}",
        f"--across_documents={lengths[-1]}",
        f"--output_dir={folder}/evaluation",
    )
    results = json.loads((folder / "evaluation" / "eval_results.json").read_text())
    title("3. Draw")
    plots = draw(folder, results)
    print("\n".join(f"  {path}" for path in plots))
    title("4. Write")
    run(
        "t5x_ssm.generate",
        *model(folder),
        f"--prompt={PROMPT}",
        "--max_new_tokens=200",
        "--temperature=0.7",
        "--seed=1",
    )
    title("5. Beside general-purpose compressors, on the same held-out bytes")
    compare(results, lengths)
    print(f"\nDone in {time.monotonic() - started:.0f} s. The run is in {folder}.")
    return 0


def train(settings: list[str], folder: pathlib.Path, steps: int) -> None:
    """Trains to the end. A new run is interrupted on the way and started again."""
    if any(folder.glob("checkpoint_*")):
        run("t5x_ssm.train", *settings)
        return
    process = subprocess.Popen(announce("t5x_ssm.train", *settings))
    try:
        while process.poll() is None and last_step(folder) < INTERRUPT_AT * steps:
            time.sleep(0.5)
        if process.poll() is None:
            print("\n--- interrupting the run: kill -TERM ---", flush=True)
            process.terminate()
            process.wait()
    except BaseException:
        process.kill()
        raise
    if process.returncode:
        sys.exit(process.returncode)
    print("--- the same command again ---", flush=True)
    run("t5x_ssm.train", *settings)


def last_step(folder: pathlib.Path) -> int:
    """The last step in the run's history; 0 without one."""
    try:
        return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def model(folder: pathlib.Path) -> list[str]:
    return [f"--model_dir={folder}"]


def draw(folder: pathlib.Path, results: dict) -> list[pathlib.Path]:
    """Loss curve and bits per byte by position, as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    figure, axes = pyplot.subplots(figsize=(7, 4))
    curve = [line for line in lines if line["split"] == "train"]
    axes.plot([line["tokens_total"] for line in curve], [line["bits_per_byte"] for line in curve], label="train")
    for domain in DOMAINS:
        points = [line for line in lines if line["split"] == f"validation/embedded_{domain}"]
        tokens = {line["step"]: line["tokens_total"] for line in curve}
        points = [point for point in points if point["step"] in tokens]
        axes.plot(
            [tokens[p["step"]] for p in points], [p["bits_per_byte"] for p in points], "o", label=f"held-out {domain}"
        )
    axes.set(xlabel="tokens", ylabel="bits per byte", title="Loss", ylim=(1.5, 5))
    axes.legend()
    loss = plots / "loss.png"
    figure.savefig(loss, dpi=120, bbox_inches="tight")
    pyplot.close(figure)

    figure, axes = pyplot.subplots(figsize=(7, 4))
    length = str(max(map(int, results["lengths"])))
    for domain in DOMAINS:
        curve = results["lengths"][length][f"embedded_{domain}"]["by_position"]
        axes.plot(curve["position"], curve["bits_per_byte"], label=domain)
    axes.axvline(TRAIN_LENGTH, color="grey", linestyle=":", label="training length")
    axes.set(xlabel="position in the document", ylabel="bits per byte", title="Held-out text", xscale="log")
    axes.legend()
    by_position = plots / "bits_per_byte_by_position.png"
    figure.savefig(by_position, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return [loss, by_position]


def compare(results: dict, lengths: list[int]) -> None:
    """Prints bits per byte of the model and of compressors, and who wins.

    The compressors see running text; the model's state is zero where a document begins, but in the line that says otherwise.
    """
    from tasks.embedded_corpus import documents

    held_out = {domain: b"".join(documents(domain, "validation")) for domain in DOMAINS}
    train = {domain: b"".join(documents(domain, "train")) for domain in DOMAINS}
    columns = {domain: compressors.bits_per_byte(train[domain], held_out[domain]) for domain in DOMAINS}
    for domain in DOMAINS:
        for length in lengths:
            value = results["lengths"][str(length)][f"embedded_{domain}"]["bits_per_byte"]
            columns[domain][f"this model, length {length}"] = value
        for length, tasks in results["across_documents"].items():
            value = tasks[f"embedded_{domain}"]["bits_per_byte"]
            columns[domain][f"  {length}, across documents"] = value
    sizes = {domain: len(held_out[domain]) for domain in DOMAINS}
    names = list(columns[DOMAINS[0]])
    total = {name: sum(columns[d][name] * sizes[d] for d in DOMAINS) / sum(sizes.values()) for name in names}
    print(f"{'bits per byte':26}" + "".join(f"{name:>9}" for name in (*DOMAINS, "all")))
    for name in names:
        print(f"{name:26}" + "".join(f"{columns[d][name]:9.3f}" for d in DOMAINS) + f"{total[name]:9.3f}")
    print(f"{'held-out bytes':26}" + "".join(f"{sizes[d]:9,}" for d in DOMAINS) + f"{sum(sizes.values()):9,}")
    best = min((name for name in names if name.startswith("this") or "across" in name), key=total.get)
    for rival in ("gzip -9", "xz -9", "xz -9, primed"):
        better = total[best] < total[rival]
        print(
            f"The model {'beats' if better else 'loses to'} {rival} by {abs(total[best] - total[rival]):.3f} bits per byte."
        )
    assert all(math.isfinite(value) for value in total.values())


def announce(module: str, *arguments: str) -> list[str]:
    """Prints a command as a user would type it; returns it for this interpreter."""
    print("$ " + shlex.join(["python", "-m", module, *arguments]), flush=True)
    return [sys.executable, "-m", module, *arguments]


def run(module: str, *arguments: str) -> None:
    """Runs a command of the project; ends with its status when it fails."""
    status = subprocess.run(announce(module, *arguments)).returncode
    if status:
        sys.exit(status)


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main(sys.argv[1:]))
