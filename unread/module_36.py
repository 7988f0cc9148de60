def function_36(x):
    return x + 36
def function_36(x):
    return x + 36
def function_36(x):
    return x + 36
def function_36(x):
    return x + 36
def function_36(x):
    return x + 36
