def function_1(x):
    return x + 1
def function_1(x):
    return x + 1
def function_1(x):
    return x + 1
def function_1(x):
    return x + 1
def function_1(x):
    return x + 1
