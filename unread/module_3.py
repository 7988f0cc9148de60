def function_3(x):
    return x + 3
def function_3(x):
    return x + 3
def function_3(x):
    return x + 3
def function_3(x):
    return x + 3
def function_3(x):
    return x + 3
