"""Training: the teacher's small loop and the student's DeepSpeed loop."""
