def function_7(x):
    return x + 7
def function_7(x):
    return x + 7
def function_7(x):
    return x + 7
def function_7(x):
    return x + 7
def function_7(x):
    return x + 7
