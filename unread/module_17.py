def function_17(x):
    return x + 17
def function_17(x):
    return x + 17
def function_17(x):
    return x + 17
def function_17(x):
    return x + 17
def function_17(x):
    return x + 17
