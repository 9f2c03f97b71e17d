"""Prints how many inputs each fuzz test tried, and what they came to."""


def pytest_terminal_summary(terminalreporter):
    total = 0
    for report in terminalreporter.getreports("passed"):
        for name, counts in getattr(report, "user_properties", ()):
            if name == "inputs tried":
                total += sum(counts.values())
                outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(counts.items()))
                terminalreporter.write_line(f"{report.nodeid}: {sum(counts.values()):,} inputs ({outcomes})")
    if total:
        terminalreporter.write_line(f"fuzz: {total:,} inputs tried")
