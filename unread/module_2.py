def function_2(x):
    return x + 2
def function_2(x):
    return x + 2
def function_2(x):
    return x + 2
def function_2(x):
    return x + 2
def function_2(x):
    return x + 2
