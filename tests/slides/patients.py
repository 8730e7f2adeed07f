"""A synthetic cohort for splits: 754 patients in 11 centres of very different sizes, two labels, one to five images each."""

import random

from jobs.training.splitting import Patient

CENTRES = {"11": 257, "4": 114, "7": 99, "1": 68, "10": 57, "5": 43, "6": 34, "3": 30, "9": 22, "2": 18, "8": 12}
_IMAGES = {1: 70, 2: 18, 3: 7, 4: 3, 5: 2}  # per cent of the patients


def synthetic_patients() -> list[Patient]:
    """The same patients each time; 72 % are CE, the rest LAA."""
    chance = random.Random(754)
    return [
        Patient(
            f"{number:04d}",
            center,
            "CE" if chance.random() < 0.72 else "LAA",
            chance.choices(list(_IMAGES), list(_IMAGES.values()))[0],
        )
        for number, center in enumerate(center for center, size in CENTRES.items() for _ in range(size))
    ]


def synthetic_rows() -> list[tuple[str, str, str, int, str]]:
    """Rows of their CSV: image_id, center_id, patient_id, image_num, label."""
    return [
        (f"{patient.patient_id}_{number}", patient.center_id, patient.patient_id, number, str(patient.label))
        for patient in synthetic_patients()
        for number in range(patient.n_images)
    ]
