import io
import math

from t5x_ssm.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, steps=range(101, 105), **settings):
    now = iter(range(1000))
    progress = Progress(1200, 100, stream=stream, clock=lambda: next(now), **settings)
    for step in steps:
        progress.update(step, {"nats": 2000 * math.log(2), "weights": 1000.0, "skipped": 0.0})
    return progress


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = run(stream, bytes_per_token=1, line_seconds=2)
    progress.message("saved")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 101/1,200  2.000 bits/byte",
        "step 103/1,200  2.000 bits/byte  1k tokens/s  18:17 left",
        "saved",
        "step 104/1,200  2.000 bits/byte  1k tokens/s  18:16 left",
    ]


def test_nats_per_token_where_the_bytes_are_not_known_and_skipped_steps_do_not_count():
    stream = io.StringIO()
    progress = run(stream, line_seconds=1000)
    progress.update(105, {"nats": math.nan, "weights": 1000.0, "skipped": 1.0})
    progress.close()
    assert stream.getvalue().splitlines()[-1] == "step 105/1,200  1.386 nats/token  1k tokens/s  18:15 left"


def test_a_bar_on_a_terminal():
    stream = Terminal()
    progress = run(stream, bytes_per_token=4)
    progress.message("saved")
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    assert "step 104/1,200  0.500 bits/byte  1k tokens/s  18:16 left" in last and "|" in last and "  9%" in last
    assert "saved\n" in stream.getvalue()


def test_silence_on_other_processes():
    stream = Terminal()
    progress = run(stream, enabled=False)
    progress.message("saved")
    progress.close()
    assert stream.getvalue() == ""


def test_a_classifier_shows_its_accuracy_and_the_speed_of_its_tokens():
    stream = io.StringIO()
    now = iter(range(1000))
    progress = Progress(10, clock=lambda: next(now), stream=stream, line_seconds=1000)
    for step in (1, 2, 3):
        progress.update(step, {"correct": 3.0, "weights": 4.0, "tokens": 2000.0, "loss": 1.0, "skipped": 0.0})
    progress.close()
    assert stream.getvalue().splitlines()[-1] == "step 3/10  0.750 accuracy  2k tokens/s  0:07 left"
