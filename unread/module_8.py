def function_8(x):
    return x + 8
def function_8(x):
    return x + 8
def function_8(x):
    return x + 8
def function_8(x):
    return x + 8
def function_8(x):
    return x + 8
