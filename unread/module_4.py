def function_4(x):
    return x + 4
def function_4(x):
    return x + 4
def function_4(x):
    return x + 4
def function_4(x):
    return x + 4
def function_4(x):
    return x + 4
