"""Records of runs that were never run, with the images that they classified correctly."""

import numpy as np

from domainbed_ext.report.inference.bootstrap import Images

ENVIRONMENTS, IMAGES, HELD_OUT = 3, 20, 5


def runs_with_images(algorithms, trials, seed=0, single_source=False, **args):
    """Runs on three environments of 20 images each, of which five are held out; those of a trial share their splits.

    Args:
        algorithms: Probability of a correct answer, by id.
        trials: Number of trials.
        seed: Seed of the answers.
        single_source: Whether each environment is trained on alone, or left out.
        args: Further arguments in the records.

    Returns:
        Records, and the images of each accuracy by (run, step).
    """
    rng = np.random.default_rng(seed)
    records, images = [], {}
    for trial in range(trials):
        held_out = [np.isin(np.arange(IMAGES), rng.permutation(IMAGES)[:HELD_OUT]) for _ in range(ENVIRONMENTS)]
        for algorithm, share in algorithms.items():
            for env in range(ENVIRONMENTS):
                record = _record(algorithm, trial, env, single_source, args)
                of_run = images[record["run"], record["step"]] = {}
                for place in range(ENVIRONMENTS):
                    is_right = rng.random(IMAGES) < share + 0.05 * trial
                    for split, chosen in (("in", ~held_out[place]), ("out", held_out[place])):
                        name = f"env{place}_{split}_acc"
                        names = [f"{number}.png" for number in np.flatnonzero(chosen)]
                        of_run[name] = Images(names, is_right[chosen])
                        record[name] = float(is_right[chosen].mean())
                records.append(record)
    return records, images


def _record(algorithm, trial, env, single_source, args):
    others = [each for each in range(ENVIRONMENTS) if each != env]
    return {
        "args": {
            "dataset": "Toy",
            "algorithm": algorithm,
            "test_envs": others if single_source else [env],
            "trial_seed": trial,
            "hparams_seed": 0,
            "protocol": "single_source" if single_source else "leave_one_out",
            **args,
        },
        "environments": ["red", "green", "blue"],
        "split_sizes": {
            f"env{each}_{split}": size
            for each in range(ENVIRONMENTS)
            for split, size in (("in", IMAGES - HELD_OUT), ("out", HELD_OUT))
        },
        "step": 5,
        "run": f"{algorithm}-{env}-{trial}",
    }
