"""The benchmark of joint scenarios measures every way and tells the numbers beside goal and floor."""

from io import StringIO

from rich.console import Console

from loadtest.benchmarks.scenarios import build_table, measure_ways


def test_a_small_run_tells_all_numbers() -> None:
    """Both methods, a call of one product and two floors, each with median and spread; the answer's true size."""
    results = measure_ways(rounds=2, products=3, steps=4, samples=10)
    assert results["answer_bytes"] == 128 + 10 * 3 * 4 * 4
    assert {spread["runs"] for spread in results["ms"].values()} == {2}
    shown = StringIO()
    Console(file=shown, width=110).print(build_table(results))
    for name in ("gaussian", "schaake", "gaussian, one product", "floor: normal numbers", "floor: bytes written"):
        assert name in shown.getvalue()
    assert "3 products x 4 steps x 10 scenarios" in shown.getvalue()
