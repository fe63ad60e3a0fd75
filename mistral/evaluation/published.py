"""Figures that others have published, for a measured one to stand beside; percent."""

# Table 2 of "Mistral 7B" (Jiang et al. 2023, arXiv 2310.06825).
PAPER = {
    "mmlu": 60.1,
    "hellaswag": 81.3,
    "winogrande": 75.3,
    "piqa": 83.0,
    "arc_easy": 80.0,
    "arc_challenge": 55.5,
}
# A summary that has been copied widely. These are not the paper's figures, and it does not say how they were measured.
COPIED = {"mmlu": 69.3, "arc_challenge": 77.7, "hellaswag": 85.4, "truthfulqa_mc2": 70.2}
COPIED_LLAMA = {"mmlu": 68.9, "arc_challenge": 73.9, "hellaswag": 83.7, "truthfulqa_mc2": 67.4}
# The metric that is reported, where a task has several, and the examples that the paper or common use puts before.
METRIC = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "piqa": "acc_norm"}
SHOTS = {"mmlu": 5}
CHANCE = {"mmlu": 25.0, "hellaswag": 25.0, "winogrande": 50.0, "piqa": 50.0, "arc_easy": 25.0, "arc_challenge": 25.0}
COLUMNS = {
    "Mistral 7B, its paper": PAPER,
    "Mistral 7B, copied summary": COPIED,
    "LLaMA 2 13B, copied summary": COPIED_LLAMA,
}
NOTE = (
    "The paper's figures are those of Table 2 of arXiv 2310.06825. The columns marked as copied come from a summary"
    " that has been passed on widely; its figures are **not** the paper's (MMLU 69.3 there, 60.1 in the paper), and it"
    " does not say how they were measured."
)
