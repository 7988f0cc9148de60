def function_11(x):
    return x + 11
def function_11(x):
    return x + 11
def function_11(x):
    return x + 11
def function_11(x):
    return x + 11
def function_11(x):
    return x + 11
