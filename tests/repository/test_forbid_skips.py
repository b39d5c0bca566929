"""With --forbid-skips nothing passes by not being run."""

from __future__ import annotations

import pytest

SKIPS = {
    "by_mark": "@pytest.mark.skip(reason='why')\ndef test_it(): pass",
    "by_condition": "@pytest.mark.skipif(True, reason='why')\ndef test_it(): pass",
    "while_it_runs": "def test_it(): pytest.skip('why')",
    "in_a_fixture": "@pytest.fixture\ndef it(): pytest.skip('why')\ndef test_it(it): pass",
    "as_a_module": "pytest.skip('why', allow_module_level=True)",
    "for_want_of_a_package": "pytest.importorskip('no_such_package')",
}

EXPECTED_FAILURE = "@pytest.mark.xfail(reason='why')\ndef test_it(): assert False"


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run a file of tests for each kind of skip, and one with a failure that is expected."""
    files = {**SKIPS, "expected_failure": EXPECTED_FAILURE}
    pytester.makepyfile(
        **{f"test_{name}": f"import pytest\n{body}" for name, body in files.items()}
    )
    return pytester.runpytest_subprocess(
        "-p", "forbid_skips", "--continue-on-collection-errors", "-ra", *arguments
    )


@pytest.fixture(autouse=True)
def plugin_on_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the inner pytest find the plugin."""
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath / "tests/plugins"))


def test_skipped_test_fails_the_run_with_forbid_skips(pytester: pytest.Pytester) -> None:
    """And says why it was skipped. An expected failure is none, though pytest reports it as one."""
    result = run(pytester, "--forbid-skips")
    result.assert_outcomes(failed=1, errors=5, xfailed=1)
    for name in SKIPS:
        result.stdout.re_match_lines([rf"(FAILED|ERROR) test_{name}\.py.*skips are forbidden here"])


def test_skipped_test_passes_the_run_without_forbid_skips(pytester: pytest.Pytester) -> None:
    """The control: without the option the same files don't fail."""
    result = run(pytester)
    result.assert_outcomes(skipped=len(SKIPS), xfailed=1)
    assert result.ret is pytest.ExitCode.OK
