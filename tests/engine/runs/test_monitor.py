"""What a run shows of itself: metrics that Prometheus' own parser reads, a log of JSON lines, progress."""

import json
import socket
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from grounded_diffusion.engine.cli.infer import build_parser, config_of
from grounded_diffusion.engine.runs import metrics, monitor, progress
from grounded_diffusion.engine.runs.monitor import Monitor, open_monitor
from grounded_diffusion.errors import UsageError

PREFIX = "grounded_diffusion_"


def parse(text):
    """(name, sorted labels) -> value, and family name -> type, as Prometheus' parser sees them."""
    families = list(text_string_to_metric_families(text))
    samples = {
        (s.name.removeprefix(PREFIX), tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples
    }
    return samples, {f.name.removeprefix(PREFIX): f.type for f in families}


def work(watch):
    """What a small run tells its monitor."""
    watch.begin(10, 2)
    watch.queue("encode", 3)
    watch.batch(4, 0.3)
    watch.batch(4, 700.0)
    watch.accepted()
    watch.accepted(3)
    watch.failed('no mask of "dog"')
    watch.rejected("area 0.001 below 0.01")
    watch.rejected("area 0.002 below 0.01")
    watch.quarantined("NaN (step 3)")
    watch.shard(0)


def test_metrics_are_what_prometheus_reads():
    watch = Monitor()
    work(watch)
    samples, types = parse(watch.render())
    assert samples["images_planned", ()] == 10
    assert samples["images_done", ()] == 2 + 4 + 2 + 1
    assert samples["images_accepted_total", ()] == 4
    assert samples["images_rejected_total", (("reason", "area"),)] == 2
    assert samples["images_quarantined_total", (("reason", "NaN"),)] == 1
    assert samples["attempt_failures_total", (("reason", "no mask"),)] == 1
    assert samples["images_generated_total", ()] == 8
    assert samples["queue_depth", (("queue", "encode"),)] == 3
    assert samples["images_per_second", ()] > 0
    assert samples["batch_seconds_sum", ()] == pytest.approx(700.3)
    assert samples["batch_seconds_count", ()] == samples["batch_seconds_bucket", (("le", "+Inf"),)] == 2
    assert samples["batch_seconds_bucket", (("le", "0.25"),)] == 0
    assert samples["batch_seconds_bucket", (("le", "0.5"),)] == samples["batch_seconds_bucket", (("le", "600.0"),)] == 1
    counters = {"images_accepted", "images_rejected", "images_quarantined", "attempt_failures", "shards_finished",
                "images_generated"}  # fmt: skip
    assert {name for name, kind in types.items() if kind == "counter"} == counters
    assert types["batch_seconds"] == "histogram"
    assert {types[name] for name in ("images_planned", "images_done", "images_per_second", "queue_depth")} == {"gauge"}


def test_what_is_unknown_is_left_out():
    _, types = parse(Monitor().render())
    assert not {"gpu_busy_ratio", "queue_depth", "images_rejected"} & types.keys()


def test_label_values_survive_quotes_and_backslashes():
    awkward = 'a "b"\\c\nd'
    watch = Monitor()
    watch.queue(awkward, 1)
    assert parse(watch.render())[0]["queue_depth", (("queue", awkward),)] == 1.0


def test_reasons_without_end_share_a_label():
    watch = Monitor()
    watch.begin(100, 0)
    for k in range(100):
        watch.rejected("no mask on " + chr(0x4E00 + k))
    samples, _ = parse(watch.render())
    values = {labels: value for (name, labels), value in samples.items() if name == "images_rejected_total"}
    assert len(values) == monitor.REASONS + 1
    assert sum(values.values()) == 100


def test_metrics_file_is_replaced_whole(tmp_path):
    path = tmp_path / "gd.prom"
    watch = Monitor(metrics_file=path)
    assert parse(path.read_text())[0]["images_accepted_total", ()] == 0
    work(watch)
    watch.close()
    assert parse(path.read_text())[0]["images_accepted_total", ()] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["gd.prom"]


def test_metrics_file_follows_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "REFRESH", 0.02)
    watch, path = Monitor(metrics_file=tmp_path / "gd.prom"), tmp_path / "gd.prom"
    work(watch)
    waited = threading.Event()
    for _ in range(200):
        if parse(path.read_text())[0]["images_accepted_total", ()] == 4:
            break
        waited.wait(0.02)
    else:
        pytest.fail("the metrics file was not refreshed")
    watch.close()


def test_a_metrics_file_that_vanishes_does_not_end_the_run(tmp_path):
    folder, said = tmp_path / "metrics", []
    folder.mkdir()
    watch = Monitor(said.append, metrics_file=folder / "gd.prom")
    watch._ticker.join(0.5)
    (folder / "gd.prom").unlink()
    folder.rmdir()
    watch.close()
    assert len(said) == 1
    assert str(folder) in said[0]


def test_endpoint():
    watch = Monitor(address=("127.0.0.1", 0))
    work(watch)
    host, port = watch.address
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert parse(answer.read().decode())[0]["images_accepted_total", ()] == 4
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://{host}:{port}/", timeout=10)
    watch.close()
    with pytest.raises(OSError):
        socket.create_connection((host, port), timeout=1).close()


def test_gpus_that_nvidia_smi_tells_of(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n[ \"$1\" = --query-gpu=index,utilization.gpu ] && printf '0, 97\\n1, [N/A]\\n2, 0\\n'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert metrics.gpu_busy() == {"0": 0.97, "2": 0.0}
    watch = Monitor(metrics_file=tmp_path / "gd.prom")
    watch.close()
    samples, _ = parse((tmp_path / "gd.prom").read_text())
    assert samples["gpu_busy_ratio", (("gpu", "0"),)] == 0.97
    tool.write_text("#!/bin/sh\nexit 9\n")  # no driver
    assert metrics.gpu_busy() == {}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert metrics.gpu_busy() == {}


def test_log(tmp_path):
    path = tmp_path / "log.jsonl"
    watch = Monitor(log=path)
    work(watch)
    watch.event("storage", error="slow")
    watch.close("interrupted")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == [
        "begin", "batch", "batch", "failed", "rejected", "rejected", "quarantined", "shard", "storage", "end"
    ]  # fmt: skip
    assert all(line["time"].endswith("Z") for line in lines)
    assert lines[4]["reason"] == "area 0.001 below 0.01"  # in full
    assert lines[1]["queues"] == {"encode": 3}
    end = lines[-1]
    assert (end["status"], end["accepted"], end["rejected"], end["quarantined"]) == (
        "interrupted", 4, {"area": 2}, {"NaN": 1}
    )  # fmt: skip
    Monitor(log=path).close()
    assert len(path.read_text().splitlines()) == len(lines) + 1


def test_plain_lines_elsewhere(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    said = []
    watch = Monitor(said.append)
    work(watch)
    watch.elsewhere(1)
    watch.close()
    assert said[0].startswith("3 of 10 images, ")
    assert "images/s" in said[0]
    assert "left" in said[0]
    assert said[-1].startswith("10 of 10 images, ")
    assert said[-1].endswith("2 rejected, 1 quarantined")
    assert watch.summary() == "4 accepted, 2 rejected (area 2), 1 quarantined (NaN 1)"


def test_lines_come_every_ten_seconds():
    said = []
    watch = Monitor(said.append)
    work(watch)
    watch.close()
    assert not said


def test_rate_is_of_the_last_minutes():
    now = [0.0]
    rate = progress.Rate(lambda: now[0])
    for second in range(1, 2001):
        now[0] = float(second)
        rate.add(10 if second <= 1000 else 2)
    assert rate.value == pytest.approx(2, rel=0.01)
    assert len(rate.points) < 400


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (65, "1:05"), (7209, "2:00:09"), (3 * 86400 + 4 * 3600 + 600, "3 d 04:10")]
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


def test_options(tmp_path):
    given = ["--prompt", "a [dog]", "--out", "out", "--log", str(tmp_path / "log"), "--metrics-port", "0"]
    watch = open_monitor(config_of(build_parser().parse_args(given)), print)
    assert watch.address[0] == "127.0.0.1"
    watch.close()
    assert metrics.parse_address("0.0.0.0:9100") == ("0.0.0.0", 9100)
    for wrong in ("x", "host:", "70000"):
        with pytest.raises(UsageError, match="metrics_port"):
            metrics.parse_address(wrong)


def test_what_cannot_be_used_is_told_in_a_line(tmp_path):
    for option in ("log", "metrics_file"):
        with pytest.raises(UsageError, match=r"cannot write .*No such file or directory") as caught:
            Monitor(**{option: tmp_path / "no" / "file"})
        assert "\n" not in str(caught.value)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(UsageError, match="choose another"):
        Monitor(address=other.getsockname())


def pace_of(ends, lanes=1, images=16):
    """A pace whose batches ended at these seconds after it began."""
    now = [0.0]
    pace = progress.Pace(lanes, lambda: now[0])
    for end in ends:
        now[0] = end
        pace.batch(images)
    return pace.value


def test_the_pace_is_not_known_after_one_batch():
    assert pace_of([4.0]) == 0.0


def test_what_opens_the_model_is_not_counted():
    assert pace_of([20.0, 24.0]) == pytest.approx(4)


def test_batches_that_end_together_are_one_round():
    assert pace_of([10.0, 10.1], lanes=2) == 0.0
    assert pace_of([10.0, 10.1, 18.0, 18.1], lanes=2) == pytest.approx(4)


def test_of_long_batches_the_first_one_counts():
    assert pace_of([100.0], lanes=2) == pytest.approx(0.32)
    assert pace_of([100.0, 101.0, 200.0], lanes=2) == pytest.approx(0.32)


def test_the_pace_is_of_the_last_minutes():
    assert pace_of([second * 4.0 for second in range(1, 100)] + [400 + k * 40.0 for k in range(1, 20)]) < 0.5


def at(monkeypatch, now):
    """A monitor of a run of 1600 images whose clock stands at now[0]."""
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    watch = Monitor()
    watch.begin(1600, 0)
    watch.rate, watch.pace = progress.Rate(lambda: now[0]), progress.Pace(1, lambda: now[0])
    return watch


def test_the_first_time_left_is_about_right(monkeypatch):
    """16 images take 4 seconds, after 10 seconds of opening; of a batch, samples are encoded one by one."""
    now = [0.0]
    watch = at(monkeypatch, now)
    now[0] = 14.0
    watch.batch(16, 14.0)
    watch.accepted()
    assert watch.progress().seconds_left is None
    watch.accepted(15)
    now[0] = 18.0
    watch.batch(16, 4.0)
    watch.accepted()
    assert watch.progress().seconds_left == pytest.approx(1583 / 4)


def test_time_left_counts_what_is_made_again(monkeypatch):
    """Half of the images are refused and tried again."""
    now = [0.0]
    watch = at(monkeypatch, now)
    for batch in range(1, 11):
        now[0] = 10 + 4.0 * batch
        watch.batch(16, 4.0)
        watch.accepted(8)
    assert watch.progress().seconds_left == pytest.approx((1600 - 80) / 2, rel=0.2)
