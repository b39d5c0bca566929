"""With --forbid-skips nothing passes by not being run."""

from __future__ import annotations

import pytest

SKIPS = {
    "by mark": "@pytest.mark.skip(reason='why')\ndef test_it(): pass",
    "by condition": "@pytest.mark.skipif(True, reason='why')\ndef test_it(): pass",
    "while it runs": "def test_it(): pytest.skip('why')",
    "in a fixture": "@pytest.fixture\ndef it(): pytest.skip('why')\ndef test_it(it): pass",
    "as a module": "pytest.skip('why', allow_module_level=True)",
    "for want of a package": "pytest.importorskip('no_such_package')",
}


def run(pytester: pytest.Pytester, body: str, *arguments: str) -> pytest.RunResult:
    """Run one test file on its own."""
    pytester.makepyfile(f"import pytest\n{body}")
    return pytester.runpytest_subprocess("-p", "forbid_skips", *arguments)


@pytest.fixture(autouse=True)
def plugin_on_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the inner pytest find the plugin."""
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath / "tests/plugins"))


@pytest.mark.parametrize("body", SKIPS.values(), ids=SKIPS)
def test_skipped_test_fails_the_run_with_forbid_skips(pytester: pytest.Pytester, body: str) -> None:
    """And says why it was skipped."""
    result = run(pytester, body, "--forbid-skips")
    assert result.ret != pytest.ExitCode.OK
    assert "skips are forbidden here" in result.stdout.str()


@pytest.mark.parametrize("body", SKIPS.values(), ids=SKIPS)
def test_skipped_test_passes_the_run_without_forbid_skips(
    pytester: pytest.Pytester, body: str
) -> None:
    """The control: without the option the same file doesn't fail."""
    result = run(pytester, body)
    assert result.ret in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}


def test_expected_failure_passes_with_forbid_skips(pytester: pytest.Pytester) -> None:
    """Though pytest reports it as one."""
    body = "@pytest.mark.xfail(reason='why')\ndef test_it(): assert False"
    run(pytester, body, "--forbid-skips").assert_outcomes(xfailed=1)
