"""How a scheme acts inside attention: on queries and keys (`rotary`), or on the logits (`separable`, `dense`)."""
