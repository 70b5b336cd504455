"""A few of tests/mutate.py's damaged studies: nothing escapes, rows are complete, the neighbours stay as they are."""

import hashlib
import shutil

import mutate
import numpy as np
import pytest
import tiny

import utils

READ = (3, 7, 9, 14, 17, 18, 21, 33, 40, 43, 57, 64, 105, 107)  # seeds
PREDICTED = (28, 95)

pytestmark = pytest.mark.filterwarnings("ignore")  # pydicom's, about what the mutations write


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return mutate.write_bases(tmp_path_factory.mktemp("bases"), 1)


@pytest.fixture(scope="module")
def good(bases):
    return [mutate.read(base) for base in bases]


@pytest.mark.slow
@pytest.mark.parametrize("seed", READ)
def test_a_mutant_is_read_without_an_exception(bases, good, tmp_path, seed):
    record = mutate.try_reading(seed, bases, good, tmp_path / "5")
    assert record["escaped"] == "", record["what"]
    study = mutate.read(tmp_path / "5")
    for volume in study.volumes:
        assert np.isfinite(volume.affine).all() and np.isfinite(volume.array).all(), record["what"]
        assert volume.array.min() >= -1 and volume.array.max() <= 8, record["what"]
    assert all(isinstance(problem, str) and problem for problem in study.problems)


@pytest.mark.slow
def test_mutants_cost_their_neighbours_nothing(bases, good, tmp_path):
    weights = tiny.write_members(tmp_path / "weights", random_spinenet=True)
    members = utils.load_members([weights], device="cpu")
    tests = tmp_path / "mutants" / "test_images"
    records = [mutate.try_reading(seed, bases, good, tests / str(1000 + seed)) for seed in PREDICTED]
    known = mutate.learn(bases, members, tmp_path / "alone")
    assert mutate.try_predicting(records, tmp_path / "mutants", members, bases, known), records[0]["escaped"]
    assert [record["rows"] for record in records] == [25] * len(PREDICTED)
    assert records[0]["neighbours"] <= 1e-6
    first, second = known["neighbours"].values()
    assert np.abs(np.subtract(first, second)).max() > 1e-6  # the networks do look at the images


@pytest.mark.slow
def test_a_seed_is_one_mutant(bases, tmp_path):
    def digest(study):
        found = hashlib.sha256()
        for path in sorted(study.rglob("*")):
            found.update(str(path.relative_to(study)).encode() + (path.read_bytes() if path.is_file() else b""))
        return found.hexdigest()

    made = {}
    for place in ("one", "two"):
        for seed in (17, 30):
            mutate.make(seed, bases, tmp_path / place / str(seed))
            made.setdefault(seed, set()).add(digest(tmp_path / place / str(seed)))
    assert all(len(digests) == 1 for digests in made.values()) and made[17] != made[30]


@pytest.mark.slow
def test_a_silent_change_is_seen_for_what_it_is(bases, good, tmp_path):
    def changed(name, change):
        study = tmp_path / name / "5"
        shutil.copytree(bases[0], study)
        for path in mutate.slices(study / "103"):
            dataset = mutate.load(path)
            change(dataset)
            mutate.save(dataset, path)
        return mutate.changes(good[0], mutate.read(study))

    assert changed("same", lambda dataset: None) == []
    (moved,) = changed("moved", lambda dataset: mutate.damage.move(dataset, np.array([0.0, 3.0, 0.0])))
    assert moved == "103: geometry of 7 slices, by up to 3 mm"
    (grey,) = changed("grey", lambda dataset: mutate.put(dataset, 4095 - mutate.values(dataset)))
    assert grey.startswith("103: greys of 7 slices") and grey.endswith("correlation from -1.00")
    record = {"seed": 1, "base": 0, "kinds": ["repaint"], "problems": [], "said": [], "changes": [grey]}
    assert mutate.finish(dict(record), bases, good, tmp_path)["silent"]
    assert not mutate.finish(record | {"said": ["a doubt"]}, bases, good, tmp_path)["silent"]
