def function_14(x):
    return x + 14
def function_14(x):
    return x + 14
def function_14(x):
    return x + 14
def function_14(x):
    return x + 14
def function_14(x):
    return x + 14
