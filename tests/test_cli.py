"""`longlive generate`, as a person meets it: files, messages and exit codes; above all for what goes wrong."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from longlive_jax import memory
from longlive_jax.cli import main
from longlive_jax.video import read_video

STAR, DISC = "a small red star stays still", "a large blue disc"
COMMAND = Path(sysconfig.get_path("scripts")) / "longlive"


@pytest.fixture
def longlive(tmp_path, monkeypatch, capsys):
    """Runs the command in this process, in an empty folder; gives exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))  # else the command sets it for good
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return ended.value.code, captured.err

    return run


@pytest.fixture
def generate(longlive, tiny_checkpoint):
    """`longlive generate` with the tiny model, pictures as small as they are."""
    return lambda *args: longlive("generate", *args, "--checkpoint", tiny_checkpoint, "--scale", 1)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sidecar(path: str) -> dict:
    return json.loads(Path(path).read_text("utf-8"))


# What goes right


def test_a_prompt_becomes_a_video(generate, tmp_path, tiny_pipeline):
    code, error = generate(STAR, "--seconds", 1.5, "--seed", 4, "--output", "videos/clip.mp4")
    assert code == 0
    assert set(files(tmp_path)) == {"videos/clip.mp4", "videos/clip.json"}
    frames = read_video("videos/clip.mp4")
    same = tiny_pipeline(STAR, seconds=1.5, seed=4, decode="blocks")
    assert frames.shape == (21, 32, 32, 3)
    assert np.abs(frames.astype(int) - same.frames[0]).mean() < 25, "as far as H.264 keeps colours of 2 x 2 pixels"
    record = sidecar("videos/clip.json")
    assert (record["prompts"], record["seed"], record["seconds"]) == ([STAR], 4, 1.5)
    assert record["settings"] == json.loads(json.dumps(same.record["settings"]))
    assert record["checkpoint"]["hash"] == tiny_pipeline.checkpoint_info["hash"]
    assert set(record["timings"]) == {"load_seconds", "first_frame_seconds", "seconds", "frames_per_second"}
    assert "memory beside the weights: 1.5 MiB (KV cache 12.0 KiB" in error
    assert "videos/clip.mp4: 21 frames, 1.3125 s of video; first frame after" in error
    assert "1.5 s asked: 3 blocks, 21 frames, 1.3125 s made" in error


def test_names_by_default(generate, tmp_path):
    assert generate("A Small, red STAR!", "--seconds", 0.5, "--seed", 4)[0] == 0
    assert set(files(tmp_path)) == {"outputs/a-small-red-star-4.mp4", "outputs/a-small-red-star-4.json"}


def test_enlarged_for_viewing(longlive, tiny_checkpoint):
    args = ("generate", STAR, "--checkpoint", tiny_checkpoint, "--seconds", 0.5)
    assert longlive(*args, "--output", "by-itself.mp4")[0] == 0
    assert longlive(*args, "--output", "twice.mp4", "--scale", 2)[0] == 0
    assert read_video("by-itself.mp4").shape[1:3] == (480, 480)
    assert read_video("twice.mp4").shape[1:3] == (64, 64)
    assert longlive("generate", "--from", "twice.json", "--output", "again.mp4")[0] == 0
    assert read_video("again.mp4").shape[1:3] == (64, 64) and sidecar("again.json")["scale"] == 2


def test_switches(generate):
    code, error = generate(STAR, DISC, STAR, "--switch-at", 0.4, 1, "--seconds", 2, "--output", "clip.mp4")
    assert code == 0
    record = sidecar("clip.json")
    assert record["prompts"] == [STAR, DISC, STAR]
    assert record["switches"] == {"asked_seconds": [0.4, 1.0], "applied_seconds": [0.5, 1.0]}
    assert f"switch at 0.4 s takes effect at 0.5 s: {DISC}\n" in error


def test_a_prompt_that_is_never_shown_is_said(generate):
    code, error = generate(STAR, DISC, "--switch-at", 0, "--seconds", 1, "--output", "clip.mp4")
    assert code == 0 and "warning: a switch at the start leaves nothing of the first prompt\n" in error


def test_again_from_the_sidecar(generate, longlive, tmp_path):
    settings = ("--switch-at", 0.5, "--seconds", 2, "--seed", 9, "--window", 4, "--switch", "keep")
    assert generate(STAR, DISC, *settings, "--output", "a.mp4")[0] == 0
    code, error = longlive("generate", "--from", "a.json", "--output", "b.mp4", "--scale", 1)
    assert code == 0 and "warning" not in error
    np.testing.assert_array_equal(read_video("b.mp4"), read_video("a.mp4"))
    changing = ("versions", "timings")
    a, b = ({k: v for k, v in sidecar(f).items() if k not in changing} for f in ("a.json", "b.json"))
    assert a == b
    assert longlive("generate", "--from", "a.json", "--output", "c.mp4", "--scale", 1, "--seed", 10)[0] == 0
    assert sidecar("c.json")["seed"] == 10 and sidecar("c.json")["settings"] == a["settings"]
    assert np.abs(read_video("c.mp4").astype(int) - read_video("a.mp4")).max() > 10


def test_from_the_sidecar_of_another_checkpoint_is_said(generate, longlive):
    assert generate(STAR, "--seconds", 0.5, "--output", "a.mp4")[0] == 0
    record = sidecar("a.json")
    record["checkpoint"]["hash"] = "0" * 64
    Path("a.json").write_text(json.dumps(record))
    code, error = longlive("generate", "--from", "a.json", "--output", "b.mp4", "--scale", 1)
    assert code == 0
    assert "is not the checkpoint that made a.json; the video will differ" in error


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_video_a_line(generate, tmp_path, suffix):
    lines = {
        "jsonl": [
            json.dumps(
                {"prompts": [STAR, DISC], "switch_frame_indices": [3], "seconds": 1.5, "seed": 5, "name": "one"}
            ),
            json.dumps({"prompts": [DISC]}),
        ],
        "txt": [STAR, DISC, "", DISC],
    }[suffix]
    (tmp_path / f"prompts.{suffix}").write_text("\n".join(lines))
    assert generate("--prompts", f"prompts.{suffix}", "--output", "made", "--seconds", 2)[0] == 0
    stems = {"jsonl": ["one", "a-large-blue-disc-0"], "txt": [
        "a-small-red-star-stays-still-0", "a-large-blue-disc-0", "a-large-blue-disc-0-2",
    ]}[suffix]  # fmt: skip
    assert set(files(tmp_path / "made")) == {stem + end for stem in stems for end in (".mp4", ".json")}
    if suffix == "jsonl":
        one = sidecar("made/one.json")
        assert (one["seed"], one["switches"]["applied_seconds"]) == (5, [1.0])
        assert len(read_video("made/one.mp4")) == 29, "--seconds goes before the file"


def test_a_folder_of_videos_is_gone_on_with(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{STAR}\n{DISC}\n")
    args = ("--prompts", "prompts.txt", "--output", "made", "--seconds", 0.5)
    assert generate(*args)[0] == 0
    (tmp_path / "made" / "a-large-blue-disc-0.mp4").unlink()
    (tmp_path / "made" / "a-large-blue-disc-0.json").unlink()
    before = files(tmp_path / "made")
    assert generate(*args)[0] == 1
    code, error = generate(*args, "--skip-existing")
    assert code == 0 and "1 of 2 videos are there" in error
    after = files(tmp_path / "made")
    assert len(after) == 4 and before.items() <= after.items()
    code, error = generate(*args, "--skip-existing")
    assert code == 0 and "2 of 2 videos are there" in error and files(tmp_path / "made") == after
    assert generate(*args, "--skip-existing", "--overwrite")[0] == 1


def test_settings_of_a_yaml_file(generate, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "num_output_frames: 6\nseed: 3\nswitch_frame_indices: 4\nglobal_sink: true\nnum_samples: 2\n"
        "model_kwargs:\n  local_attn_size: 4\n  sink_size: 1\n"
    )
    args = ("--config", "run.yaml", "--sink-frames", 2, "--switch", "keep", "--output", "clip.mp4")
    code, said = generate(STAR, DISC, *args)
    assert code == 0 and "run.yaml: num_samples has no say here: run again with another --seed" in said
    record = sidecar("clip.json")
    assert (record["seed"], record["seconds"], record["switches"]["asked_seconds"]) == (3, 1.5, [1.0])
    expected = {"window": 4, "sink": "keep", "sink_frames": 2, "switch": "keep", "block_frames": 2}
    assert {name: record["settings"][name] for name in expected} == expected


def test_what_exists_is_kept_unless_told_otherwise(generate, tmp_path):
    (tmp_path / "clip.mp4").write_text("dear")
    code, error = generate(STAR, "--seconds", 0.5, "--output", "clip.mp4")
    assert code == 1
    assert error == "longlive: clip.mp4 exists and is kept; give another --output, or --overwrite to replace it\n"
    assert files(tmp_path) == {"clip.mp4": b"dear"}
    (tmp_path / "clip.mp4").rename(tmp_path / "clip.json")
    assert generate(STAR, "--seconds", 0.5, "--output", "clip.mp4")[0] == 1
    assert files(tmp_path) == {"clip.json": b"dear"}, "the sidecar of another video is dear too"
    assert generate(STAR, "--seconds", 0.5, "--output", "clip.mp4", "--overwrite")[0] == 0
    assert len(read_video("clip.mp4")) == 5 and sidecar("clip.json")["prompts"] == [STAR]


def test_prompts_are_printed_as_they_are(generate):
    odd = "a [/red] [bold]star[/bold] :star: " + "very " * 60 + "far away"
    code, error = generate(STAR, odd, "--seconds", 1, "--output", "a[b].mp4")
    assert code == 0
    assert f"takes effect at 0.5 s: {odd}\n" in error
    assert f"prompt longer than 24 tokens, cut: {odd[:60]}...\n" in error
    assert "a[b].mp4" in error


# What goes wrong


def damaged(damage):
    """A copy of the tiny checkpoint with something wrong, made by `damage(folder)`."""

    def prepare(here: Path, tiny: Path):
        shutil.copytree(tiny, here / "broken")
        damage(here / "broken")

    return prepare


def written(name: str, text: str | bytes):
    """A file of that name."""

    def prepare(here: Path, tiny: Path):
        (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return prepare


def cut_short(folder: Path):
    path = folder / "transformer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_tensors(folder: Path):
    tensors = load_file(folder / "vae.safetensors")
    tensors["surplus.weight"] = tensors.pop("quant.bias")
    tensors["post_quant.bias"] = tensors["post_quant.bias"][:2]
    save_file(tensors, folder / "vae.safetensors")


def unknown_key(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config["sampler"]["windw"] = config["sampler"].pop("window")
    (folder / "config.json").write_text(json.dumps(config))


TINY = ("--checkpoint", "TINY", "--seconds", "2")
BROKEN = (STAR, "--checkpoint", "broken")
BAD = {
    "no prompt": (None, (), 'nothing says what to show; write longlive generate "a prompt"'),
    "empty prompt": (None, ("", *TINY), "prompt 1 is empty; write what is to be seen"),
    "blank prompt": (None, (STAR, " ", *TINY), "prompt 2 is empty"),
    "prompt and file": (written("p.txt", STAR), (STAR, "--prompts", "p.txt"), "prompts, --prompts and --from exclude"),
    "seconds 0": (None, (STAR, "--seconds", "0"), "seconds is 0.0; a length must be a number above 0"),
    "seconds nan": (None, (STAR, "--seconds", "nan"), "seconds is nan; a length must be a number above 0"),
    "seed": (None, (STAR, "--seed", "-1"), "seed is -1; it must be a whole number from 0 to 4294967295"),
    "dtype": (None, (STAR, "--dtype", "float16"), "dtype is 'float16'; float32 and bfloat16 are known"),
    "scale": (None, (STAR, "--scale", "-2"), "--scale is -2; give 1 or more, or 0 to choose by itself"),
    "too few switches": (None, (STAR, DISC, STAR, "--switch-at", "1", *TINY), "3 prompts need 2 switch times"),
    "late switch": (None, (STAR, DISC, "--switch-at", "9", *TINY), "the switch at 9 s .* would take effect after the"),
    "falling switches": (None, (STAR, DISC, STAR, "--switch-at", "1", ".5", *TINY), "switch times must rise"),
    "too many prompts": (None, (*(STAR,) * 5, *TINY), "5 prompts do not fit into 2 s .* ask for --seconds 2.5"),
    "height": (None, (STAR, *TINY, "--height", "50"), "height 50 is not a multiple of 16 pixels; .*: 48 or 64"),
    "width": (None, (STAR, *TINY, "--width", "0"), "width is 0; at least 1 pixel"),
    "window": (None, (STAR, *TINY, "--window", "3"), "window is 3 latent frames; .* at least 4 "),
    "steps": (None, (STAR, *TINY, "--steps", "1", "2"), "steps .* must fall"),
    "switch value": (None, (STAR, *TINY, "--switch", "recash"), "unknown switch value 'recash'; did you mean 'recach"),
    "length": (None, (STAR, *TINY[:2], "--seconds", "300", "--rope", "absolute"), "1200 latent frames do not fit"),
    "output suffix": (None, (STAR, *TINY, "--output", "a.avi"), "--output is a.avi; a video's name must end in .mp4"),
    "output folder": (
        lambda here, _: (here / "a.mp4").mkdir(), (STAR, *TINY, "--output", "a.mp4"), "a.mp4 is a folder; give a file",
    ),
    "output in a file": (written("a", "x"), (STAR, *TINY, "--output", "a/b.mp4"), "a is not a folder; give another"),
    "folder is a video": (
        written("p.txt", STAR), ("--prompts", "p.txt", *TINY, "--output", "a.mp4"), "--prompts makes one video a line",
    ),
    "folder is a file": (
        written("p.txt", STAR), ("--prompts", "p.txt", *TINY, "--output", "p.txt"), "--output p.txt is a file",
    ),
    "switches of a file": (
        written("p.txt", STAR), ("--prompts", "p.txt", "--switch-at", "1"), "--switch-at goes with prompts on the comm",
    ),
    "no such file": (None, ("--prompts", "none.txt", *TINY), "cannot read none.txt: No such file or directory"),
    "neither": (written("p.csv", STAR), ("--prompts", "p.csv", *TINY), "p.csv is neither .txt .* nor .jsonl"),
    "empty file": (written("p.txt", "\n \n"), ("--prompts", "p.txt", *TINY), "p.txt holds no prompts"),
    "not UTF-8": (written("p.txt", b"a\n\xff\n"), ("--prompts", "p.txt", *TINY), "p.txt:2: not UTF-8"),
    "not JSON": (
        written("p.jsonl", '{"prompts": ["a"]}\n{"prompts": ["a"]'), ("--prompts", "p.jsonl", *TINY),
        "p.jsonl:2: not valid JSON .column 18",
    ),
    "unknown JSON key": (
        written("p.jsonl", '{"prompts": ["a"], "sed": 1}'), ("--prompts", "p.jsonl", *TINY),
        "p.jsonl:1: unknown key 'sed'; did you mean 'seed'",
    ),
    "JSON without prompts": (
        written("p.jsonl", '{"prompts": []}'), ("--prompts", "p.jsonl", *TINY), "p.jsonl:1: there is no prompt",
    ),
    "late switch in line 2": (
        written("p.jsonl", '{"prompts": ["a"]}\n{"prompts": ["a", "b"], "switch_seconds": [7]}'),
        ("--prompts", "p.jsonl", *TINY, "--output", "made"), "the switch at 7 s .* would take effect after the end",
    ),
    "no YAML": (None, (STAR, *TINY, "--config", "a.yaml"), "cannot read a.yaml: No such file"),
    "YAML key": (
        written("a.yaml", "sink_sise: 3\n"), (STAR, *TINY, "--config", "a.yaml"),
        "a.yaml: unknown key 'sink_sise'; did you mean 'sink_size'",
    ),
    "switches of a YAML": (
        written("a.yaml", "switch_frame_indices: 4, 6\n"), (STAR, DISC, *TINY, "--config", "a.yaml"),
        "2 prompts need 1 switch times .* but there are 2",
    ),
    "no sidecar": (None, ("--from", "a.json"), "a.json does not exist; --from takes the .json"),
    "no sidecar JSON": (written("a.json", "{"), ("--from", "a.json"), "a.json:1: not valid JSON"),
    "another JSON": (written("a.json", "{}"), ("--from", "a.json"), "a.json is not the record of a longlive video"),
    "no checkpoint": (None, (STAR, "--checkpoint", "nowhere"), "checkpoint 'nowhere' is neither a folder, nor a hub"),
    "empty checkpoint": (lambda here, _: (here / "broken").mkdir(), BROKEN, "broken/config.json is missing"),
    "config key": (damaged(unknown_key), BROKEN, "config.json: sampler: unknown key 'windw'; did you mean 'window'"),
    "config cut short": (
        damaged(lambda f: (f / "config.json").write_text('{"format"')), BROKEN, "config.json is not valid JSON",
    ),
    "no weights": (
        damaged(lambda f: (f / "vae.safetensors").unlink()), BROKEN, "broken/vae.safetensors is missing",
    ),
    "weights cut short": (damaged(cut_short), BROKEN, "broken/transformer.safetensors is cut off or damaged"),
    "no file of weights": (
        damaged(lambda f: (f / "vae.safetensors").write_text("x")), BROKEN, "broken/vae.safetensors is cut off or dama",
    ),
    "other tensors": (
        damaged(other_tensors), BROKEN,
        r"3 faults: .*lacks quant.bias; .*has unexpected surplus.weight; .*post_quant.bias is \[2\], expected \[4\]",
    ),
    "too large": (None, (STAR, "--scale", "257", "--checkpoint", "TINY"), "wider than 8192 pixels; give 256 at most"),
    "no tokeniser": (
        damaged(lambda f: (f / "tokenizer.json").unlink()), BROKEN, "this checkpoint has no tokeniser, so it cannot re",
    ),
    "broken tokeniser": (
        damaged(lambda f: (f / "tokenizer.json").write_text("{")), BROKEN, "tokenizer.json is no tokenizer file",
    ),
}  # fmt: skip
"""What is wrong: (what to prepare, arguments, the message)."""


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_written(longlive, tmp_path, tiny_checkpoint, name):
    prepare, args, message = BAD[name]
    if prepare is not None:
        prepare(tmp_path, tiny_checkpoint)
    before = files(tmp_path)
    code, error = longlive("generate", *(tiny_checkpoint if arg == "TINY" else arg for arg in args))
    assert code == 1
    ours = [line for line in error.splitlines() if line.startswith("longlive: ")]
    assert ours == error.splitlines()[-1:], "one line, and the last"
    assert "Traceback" not in error
    assert re.search(message, ours[0])
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", STAR, "--hight", "64"), "--height"),
        (("generate", STAR, "--seed", "one"), "--seed"),
        (("generat",), "generate"),
        ((), "generate"),
    ],
)
def test_wrong_usage(longlive, tmp_path, args, message):
    code, error = longlive(*args)
    assert code == 2
    assert message in error and "Traceback" not in error
    assert files(tmp_path) == {}


def test_too_little_memory(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "check_weights", lambda *args: None)
    monkeypatch.setattr(memory, "available", lambda mesh: 2**20)
    code, error = generate(STAR, "--seconds", 0.5, "--output", "clip.mp4")
    assert code == 1
    assert error.startswith("longlive: 1.5 MiB (KV cache 12.0 KiB, prompt keys and values")
    assert "are needed, but only 1.0 MiB are free; make the picture (32 x 32), the window" in error
    assert files(tmp_path) == {}


# As a process of its own


@pytest.fixture(scope="module")
def process(tmp_path_factory, tiny_checkpoint):
    """Starts `longlive generate` with the tiny model; programs that it compiles are kept for the next."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}

    def start(folder: Path, *args) -> subprocess.Popen:
        command = [COMMAND, "generate", *args, "--checkpoint", tiny_checkpoint]
        # Who starts the tests in the background may have had them ignore Ctrl-C, and that is inherited.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        command = [str(part) for part in command]
        return subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE, preexec_fn=heed
        )

    start.cache = cache
    return start


def test_the_installed_command(process, tmp_path):
    running = process(tmp_path, STAR, "--seconds", 1, "--output", "clip.mp4")
    error = running.communicate()[1]
    assert running.returncode == 0, error
    assert "clip.mp4: 13 frames" in error and "Warning" not in error
    assert len(read_video(tmp_path / "clip.mp4")) == 13
    assert list((process.cache / "longlive_jax" / "compiled").iterdir()), "compiled programs are kept for the next run"


def test_what_an_interrupted_run_made_plays(process, tmp_path):
    running = process(tmp_path, STAR, "--seconds", 250, "--scale", 20, "--output", "clip.mp4")
    video = tmp_path / "clip.mp4"
    while running.poll() is None and not (video.exists() and video.stat().st_size > 20_000):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    error = running.communicate()[1]
    assert running.returncode == 130, error
    assert error.splitlines()[-1] == "longlive: stopped" and "Traceback" not in error
    assert 1 <= len(read_video(video)) < 3997
    assert os.listdir(tmp_path) == ["clip.mp4"], "no sidecar of half a video"


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["generate"], 1),
        (["generate", "a small red star", "--prompts", "none.txt"], 1),
        (["convert", "--output", "x"], 1),
        (["train", "ar", "--output", "run", "--no-such-option"], 2),
    ],
)
def test_help_and_bad_input_do_not_wait_for_jax(args, status, tmp_path):
    lines = (
        "import sys",
        "from longlive_jax import cli",
        "try: cli.main(sys.argv[1:])",
        "except SystemExit as end: code = end.code",
        "assert 'jax' not in sys.modules, 'jax was imported'",
        "sys.exit(code)",
    )
    code = "\n".join(lines)
    ended = subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == status and "jax was imported" not in ended.stderr, ended.stderr
