def of(experiment): return ""
