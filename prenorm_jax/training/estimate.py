def of(experiment):
    return ""
