def function_19(x):
    return x + 19
def function_19(x):
    return x + 19
def function_19(x):
    return x + 19
def function_19(x):
    return x + 19
def function_19(x):
    return x + 19
