"""Upstream's scripts on a terminal."""

import pytest

from tests.domainbed_ext.conftest import make_domains
from tests.terminal import assert_clean, interrupted, run


@pytest.mark.slow
def test_upstreams_training_ends_and_hears_ctrl_c(checkout, tmp_path):
    make_domains(tmp_path / "data" / "PACS", images=10)
    hparams = '{"backbone": "test_vit", "weights": "none", "batch_size": 4}'
    words = (
        *("domainbed_ext.upstream", "--checkout", checkout, "--workers", "0", "train", "--dataset", "PACS"),
        *("--algorithm", "LP", "--data_dir", tmp_path / "data", "--hparams", hparams, "--skip_model_save"),
    )
    ended = run(*words, "--steps", "2", "--checkpoint_freq", "1", "--output_dir", tmp_path / "ended")
    assert ended.code == 0 and (tmp_path / "ended" / "done").exists(), ended.screen
    assert_clean(tmp_path / "ended" / "out.txt", tmp_path / "ended" / "err.txt")
    more = ("--steps", "1000000", "--checkpoint_freq", "2", "--output_dir", tmp_path / "stopped")
    stopped = interrupted(*words, *more, at=r"step_time *\n(.*\n)+")
    assert stopped.code == 130 and "Traceback" not in stopped.screen
    assert stopped.screen.count("interrupted: run the same command again\n") == 1
