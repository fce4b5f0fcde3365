from trainer.reporting import console


def test_duration():
    assert [console.duration(s) for s in (0.4, 75, 4000)] == ["0:00", "1:15", "1:06:40"]


def test_off_a_terminal_lines_are_rare_unless_wanted_now(caplog, monkeypatch):
    monkeypatch.setattr(console.log, "propagate", True)
    caplog.set_level("INFO", console.log.name)
    status = console.StatusLine()
    for i in range(5):
        status.show(f"line {i}")
    status.show("the last", now=True)
    assert caplog.messages == ["line 0", "the last"]
