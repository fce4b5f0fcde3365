"""Evaluation tasks whose numbers others recognise: those of lm-evaluation-harness, HellaSwag and DCLM CORE."""
