"""kd-accel export: a student in the formats of the places where it is to be used."""
