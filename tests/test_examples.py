"""The examples: their syntax, the fields that matter, and every gd-infer command line in them and in the docs."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sbatch")) + sorted(EXAMPLES.glob("*.sh"))
MANIFESTS = sorted(EXAMPLES.glob("*.yaml"))


def commands(file):
    """The arguments of each gd-infer in a file: to the end of its line, lines that are continued included."""
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if match := re.match(r"\s*(?:srun |ray job submit .*-- +)?gd-infer (.*)", line):
            arguments = re.split(r"\|\||&&|;|\[", match[1])[0]
            yield shlex.split(arguments, comments=True)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts(file):
    subprocess.run(["bash", "-n", file], check=True, timeout=10)


@pytest.mark.parametrize("file", [*SCRIPTS, *MANIFESTS, ROOT / "docs/many-machines.md"], ids=lambda file: file.name)
def test_command_lines(file):
    from grounded_diffusion.engine.cli.infer import build_parser

    found = list(commands(file))
    assert found, "no gd-infer command"
    for arguments in found:
        parsed = build_parser().parse_args(arguments)
        assert str(parsed.out)
        assert parsed.prompts


def manifest(name):
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def test_slurm():
    text = (EXAMPLES / "slurm-array.sbatch").read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert re.fullmatch(r"0-\d+", options["array"])
    assert options["ntasks"] == "1"
    assert "requeue" in options
    assert options["signal"].startswith("TERM@")  # to the step, which is gd-infer, and not to the script
    assert next(commands(EXAMPLES / "slurm-array.sbatch"))[:2] == ["--shard", "auto"]


@pytest.mark.parametrize("status", [0, 1, 2, 3, 75])
def test_the_slurm_script_queues_itself_again_when_interrupted(tmp_path, status):
    """Run it with an srun and an scontrol that note what they are asked."""
    for name, code in (("srun", status), ("scontrol", 0)):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/log\nexit {code}\n')
        tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    script = ["bash", EXAMPLES / "slurm-array.sbatch"]
    assert subprocess.run(script, env=environment, timeout=10).returncode == status
    first, *rest = (tmp_path / "log").read_text().splitlines()
    assert first.startswith("srun gd-infer --shard auto ")
    assert rest == (["scontrol requeue 7_3"] if status == 75 else [])


def test_kubernetes():
    from grounded_diffusion.engine.runs.share import KUBERNETES_TOTAL

    job = manifest("kubernetes-job.yaml")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert pod["restartPolicy"] == "Never"  # as podFailurePolicy demands
    assert {"name": KUBERNETES_TOTAL, "value": str(spec["completions"])} in container["env"]
    rules = {rule["action"] + str(rule.get("onExitCodes", {}).get("values")): rule for rule in
             spec["podFailurePolicy"]["rules"]}  # fmt: skip
    assert {"Ignore[75]", "FailJob[2]"} <= set(rules)
    assert rules["Ignore[75]"]["onExitCodes"]["containerName"] == container["name"]
    check_mounts(pod)


@pytest.mark.parametrize(("status", "ends"), [(0, 0), (1, 1), (2, 2), (3, 0), (75, 75)])
def test_the_kubernetes_command_passes_the_exit_status_on(tmp_path, status, ends):
    container = manifest("kubernetes-job.yaml")["spec"]["template"]["spec"]["containers"][0]
    tool = tmp_path / "gd-infer"
    tool.write_text(f"#!/bin/bash\nexit {status}\n")
    tool.chmod(0o755)
    done = subprocess.run([*container["command"], *container["args"]], env={"PATH": f"{tmp_path}:/bin"}, timeout=10)
    assert done.returncode == ends


def test_ray():
    job = manifest("ray-job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"]
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert f"--workers {workers['replicas']} " in job["spec"]["entrypoint"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        check_mounts(group["template"]["spec"])


def check_mounts(pod):
    """Every mount has its volume, and every volume is mounted."""
    mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def python_blocks(file):
    """The Python in a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```$", file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def shipped(tiny_bundle, tmp_path, monkeypatch):
    """In an empty folder, where the shipped model is a small one."""
    from grounded_diffusion.engine.pipeline import pipeline
    from grounded_diffusion.engine.runs import open as runs_open

    for module in (pipeline, runs_open):
        monkeypatch.setattr(module, "shipped_bundle", lambda *_: tiny_bundle)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_data_set(shipped, capsys):
    (example,) = [block for block in python_blocks(ROOT / "README.md") if "make_dataset" in block]
    assert example.count("\n") <= 12
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["result"].samples == 8
    assert names["result"].finished
    assert (shipped / "pets" / "annotations" / "instances_train.json").exists()
    assert capsys.readouterr().out.endswith(" images in pets\n")


def test_the_page_on_python(shipped, capsys):
    """From its first block to its last, in one namespace."""
    names = {}
    for number, block in enumerate(python_blocks(ROOT / "docs/python.md"), 1):
        exec(compile(block, f"block {number} of docs/python.md", "exec"), names)
    said = capsys.readouterr().out
    assert "4 of 4 samples, nothing refused" in said
    assert "4/4, " in said
    assert "(64, 64, 3)" in said
    assert {path.name for path in shipped.iterdir()} == {"pets", "shared", "more"}


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_is_there(page):
    """Every link within the repository, and every source file in backquotes."""
    text = page.read_text(encoding="utf-8")
    links = {page.parent / link.partition("#")[0] for link in re.findall(r"\]\(([^):]+)\)", text)}
    folders = "bench|engine|export|grounded_diffusion|kernels|tests|training"
    files = {ROOT / name for name in re.findall(rf"`((?:{folders})/[\w/.-]+)`", text)}
    assert [str(path) for path in sorted(links | files) if not path.exists()] == []
