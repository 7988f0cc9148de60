def function_6(x):
    return x + 6
def function_6(x):
    return x + 6
def function_6(x):
    return x + 6
def function_6(x):
    return x + 6
def function_6(x):
    return x + 6
