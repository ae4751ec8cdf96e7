"""Old import paths and names of what plugins import: they still work, and each warns and names its heir."""

import subprocess
import sys
from importlib import import_module

import pytest

import adapterhub
from adapterhub.moved import HEIRS, RENAMED

OLD = {
    "adapterhub.modification": "Modification Step Tap times project named_tensors",
    "adapterhub.method": "Method Stage Given Measurement",
    "adapterhub.objective": "Objective",
    "adapterhub.recipe": "Recipe",
    "adapterhub.parameter_schedule": "ParameterSchedule",
    "adapterhub.verifier": "Verifier Verdict",
    "adapterhub.setting": "Setting Moment",
    "adapterhub.encoding": "Example encode collate pad_left IGNORE grouped",
    "adapterhub.scoring": "token_losses label_scores",
    "adapterhub.contracts": "make",
    "adapterhub.composers": "Stack Mix Scaled Route Inside Composite",
    "adapterhub.gate": "Gate",
    "adapterhub.adapter": "Adapter Modifications modifications_of check_fit bind as_parameters require_effect",
    "adapterhub.weights": "values matrix widths",
    "adapterhub.magnitude": "largest",
    "adapterhub.runtime": "Model load",
    "adapterhub.bases": "resolve cache_folder load_model load_tokenizer",
    "adapterhub.tensors": "load dump check_finite",
    "adapterhub.lanes": "Lane",
    "adapterhub.formats.bounded_re": "match",
    "adapterhub.formats.peft_types": "TUNERS",
    "adapterhub.durable": "write_bytes",
    "adapterhub.evaluate": "evaluate paired",
    "adapterhub.manifest": "Manifest Release Reference canonical digest_of check_name",
}
"""What version 0.1.0 had there, of what its authors' guide and our own packages import."""


@pytest.mark.parametrize("path", OLD)
def test_an_old_path_gives_what_its_heir_has_and_names_it(path):
    module = import_module(path)
    for name in OLD[path].split():
        with pytest.warns(DeprecationWarning) as caught:
            found = getattr(module, name)
        (warning,) = caught
        assert warning.filename == __file__
        old, heir = str(warning.message).partition(";")[0].removesuffix(" now").split(" is ")
        home, _, today = heir.rpartition(".")
        assert old == f"{path}.{name}" and getattr(import_module(home), today) is found


def test_every_heir_is_there_and_no_old_path_is():
    for old, heirs in HEIRS.items():
        assert all(import_module(heir) for heir in heirs)
        with pytest.raises(AttributeError):
            _ = import_module(old).nothing_of_the_kind


@pytest.mark.parametrize("name", sorted(RENAMED.keys() & {"Given", "Moment", "Setting"}))
def test_an_old_public_name_warns(name):
    with pytest.warns(DeprecationWarning, match=f"adapterhub.{name} is adapterhub.{RENAMED[name]} now") as caught:
        found = getattr(adapterhub, name)
    assert found is getattr(adapterhub, RENAMED[name]) and caught[0].filename == __file__


def test_an_old_name_that_was_never_public_is_none_now(recwarn):
    with pytest.raises(AttributeError):
        _ = adapterhub.Learner
    assert not recwarn.list


def test_nothing_of_ours_takes_an_old_path():
    code = "import sys\nsys.argv = ['x', '--help']\nfrom adapterhub.cli.app import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:adapterhub", "-c", code], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-500:]
