"""One job: open, ask, plan, run, check, publish. `pipeline` is the page to read first."""
