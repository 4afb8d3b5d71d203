"""What a training session says at its end; the sessions themselves are run in test_commands.py."""

import json

from dalle_ds.training.session import warn_of_skipped


def test_what_was_left_out_is_counted_once_though_several_ranks_name_it(tmp_path, capsys):
    lines = [json.dumps({"key": key, "origin": "a.tar", "reason": "no caption"}) + "\n" for key in ("1", "2", "1")]
    (tmp_path / "skipped.jsonl").write_text("".join(lines))
    warn_of_skipped(tmp_path)
    said = capsys.readouterr().out
    assert said == f"warning: 2 samples or shards were left out; {tmp_path / 'skipped.jsonl'} names them\n"


def test_nothing_is_said_when_nothing_was_left_out(tmp_path, capsys):
    warn_of_skipped(tmp_path)
    assert capsys.readouterr().out == ""
