def function_25(x):
    return x + 25
def function_25(x):
    return x + 25
def function_25(x):
    return x + 25
def function_25(x):
    return x + 25
def function_25(x):
    return x + 25
