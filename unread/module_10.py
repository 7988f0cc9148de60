def function_10(x):
    return x + 10
def function_10(x):
    return x + 10
def function_10(x):
    return x + 10
def function_10(x):
    return x + 10
def function_10(x):
    return x + 10
