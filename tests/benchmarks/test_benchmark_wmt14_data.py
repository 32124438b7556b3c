import dataclasses

from benchmarks.runner import main
from benchmarks.wmt14_data import BENCHMARK, prepare, read


def test_the_steps_run_in_processes_of_their_own(tmp_path, capsys):
    asked = []

    def isolate(function, root, *arguments, timeout):
        asked.append((function, arguments))
        assert len((root / "train.en").read_text(encoding="utf-8").splitlines()) == 50
        reading = {"first_batch_seconds": 0.5, "pairs_per_second": 1e4, "process_gb": 1.0, "worker_gb": 0.5}
        return {"seconds": 10.0, "process_gb": 2.0} if function is prepare else {**reading, "padding": 0.05}

    [case] = BENCHMARK.cases
    case = dataclasses.replace(case, problem=dataclasses.replace(case.problem, types=500))
    benchmark = dataclasses.replace(BENCHMARK, cases=(case,))
    main(benchmark, ["--pairs", "50", "--output", str(tmp_path), "--folder", str(tmp_path)], isolate=isolate)
    assert asked == [(prepare, (4096,)), (read, (4096, 0)), (read, (4096, 2))]
    printed = capsys.readouterr().out
    assert "preparing, sentences a second" in printed
    text = (tmp_path / "wmt14_data.md").read_text(encoding="utf-8")
    assert "pairs: 50, max tokens: 4096" in text
    assert "| preparing, sentences a second | 10 |" in text
    assert "| padding | 5.0 % |" in text
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"], "the scratch files are gone"
