"""A pytest plugin: a line of JSON for every test as it ends, so that a run that is cut off has told what it knew."""

import json
import os


def pytest_runtest_logreport(report) -> None:
    """Append (test, outcome, message) to the file KPU_FAST_VISIT_REPORT; with xdist called for all workers."""
    if report.when != "call" and report.outcome == "passed":
        return
    outcome = report.outcome if report.outcome != "failed" else "failure" if report.when == "call" else "error"
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(crash, "message", report.longrepr)
    message = "" if outcome == "passed" else str(reason).removeprefix("Skipped: ")[:300]
    with open(os.environ["KPU_FAST_VISIT_REPORT"], "a", encoding="utf-8") as file:
        file.write(json.dumps([report.nodeid, outcome, message]) + "\n")
