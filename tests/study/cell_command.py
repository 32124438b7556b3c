"""A command in the place of train.py, which trains nothing and keeps the same files."""

from pathlib import Path

__all__ = ["TRAIN"]

REPOSITORY = Path(__file__).parents[2]

TRAIN = f"""
import json, os, signal, sys, time
from pathlib import Path

sys.path.insert(0, {str(REPOSITORY)!r})
if sys.argv[1] == "study":
    from lightning_attn.cli import main

    main()
    raise SystemExit
from lightning_attn import locks
from lightning_attn.training.code_version import code_version

stage, *words = sys.argv[1:]
options = {{name: value for name, value in zip(words[::2], words[1::2])}}
steps, pause = int(options.get("--trainer.max_steps", 0)), float(options.get("--model.pause", 0))
if words[-1:] == ["--print_config"]:
    if "--model.no_option" in options:
        print("error: model.no_option: there is no such option")
        raise SystemExit(2)
    raise SystemExit
if stage == "profile":
    with open("profiles.log", "a") as log:
        log.write(json.dumps([options["--output"], os.environ.get("OMP_NUM_THREADS"), os.getpid(), words]) + "\\n")
    time.sleep(float(options.get("--model.profile_pause", 0)))
    if "--model.no_profile" in options or "--model.no_option" in options:
        print("error: data: there is no file of pieces")
        raise SystemExit(2)
    step = float(options.get("--model.step_seconds", pause))
    content = json.dumps({{"device": "none", "training_step": {{"latency": {{"median": step}}}}}})
    Path(options["--output"]).write_text(content)
    raise SystemExit
root = Path(options["--run.root"])
with open("events.log", "a") as events:
    share = os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES")
    events.write(json.dumps([stage, root.name, os.getpid(), *share]) + "\\n")
if options.get("--model.fail") == stage and not Path("repaired").exists():
    print("error: model.fail: this was to be expected")
    raise SystemExit(2)
run = root / "translation" / "run"
run.mkdir(parents=True, exist_ok=True)
if stage == "test":
    scores = {{"test/bleu": 0.1 * int(options["--seed_everything"]) + float(options["--model.quality"])}}
    (run / "test_metrics.json").write_text(json.dumps(scores))
    raise SystemExit
assert locks.take(run / ".lock") is not None
if not (run / "run.json").exists():
    (run / "run.json").write_text(json.dumps({{"code": code_version()}}))
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(number))
metrics = run / "metrics.csv"
if not metrics.exists():
    metrics.write_text("step,val/bleu\\n")
for step in range(len(metrics.read_text().splitlines()) - 1, steps):
    time.sleep(pause)
    with metrics.open("a") as file:
        file.write(f"{{step}},{{step / 100}}\\n")
    print(f"step {{step + 1}}/{{steps}} ETA 1.5 min", flush=True)
    if received:
        raise SystemExit(128 + received[0])
"""
