"""Student and frozen teacher in one module, which is what the engine prepares."""

from __future__ import annotations

from torch import Tensor, nn

from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher


class Pair(nn.Module):
    """One module, because an engine prepares one.

    So ZeRO-3 partitions the frozen teacher as well (half its bytes on two ranks; a second engine for it cannot be
    checkpointed), and one forward call reaches both: under ZeRO-3 parameters are whole only inside that call. The
    teacher stays in eval mode by its own train().
    """

    def __init__(self, student: Student, teacher: Teacher | None):
        super().__init__()
        self.student = student
        self.teacher = teacher

    def forward(self, image: Tensor, text: Tensor, teacher_text: Tensor | None) -> dict[str, dict[str, Tensor]]:
        """uint8 `image[b,3,H,W]`, each model's tokens `[b,T]` -> {"student": ..., "teacher": ...}, raw embeddings each.

        Without a teacher there is no key "teacher", and `teacher_text` is not looked at.
        """
        features = {"student": self.student(image, text)}
        if self.teacher is not None:
            features["teacher"] = self.teacher(image, teacher_text)
        return features
