def function_0(x):
    return x + 0
def function_0(x):
    return x + 0
def function_0(x):
    return x + 0
def function_0(x):
    return x + 0
def function_0(x):
    return x + 0
