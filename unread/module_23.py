def function_23(x):
    return x + 23
def function_23(x):
    return x + 23
def function_23(x):
    return x + 23
def function_23(x):
    return x + 23
def function_23(x):
    return x + 23
