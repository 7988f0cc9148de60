def function_12(x):
    return x + 12
def function_12(x):
    return x + 12
def function_12(x):
    return x + 12
def function_12(x):
    return x + 12
def function_12(x):
    return x + 12
